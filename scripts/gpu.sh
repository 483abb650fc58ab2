#!/usr/bin/env bash
# On a machine with a GPU: the tests that need one, and the benchmark at the shipped size and at transformer-big cost.
#
#   bash scripts/gpu.sh OUT [SENTENCES]
#
# OUT gets a table of each size, in float32 and in half precision. The column `differ` says how many sentences are not
# greedy decoding's: lossless BiLD has 0 there in float32, and few in half precision.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ $# -lt 1 || $# -gt 2 ]]; then
    echo "usage: gpu.sh OUT [SENTENCES]" >&2
    exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
sentences=${2:-100}

# shellcheck source=setup.sh
source "$root/scripts/setup.sh"
setup_python requirements-dev.txt
if ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu.sh: torch finds no GPU here" >&2
    exit 1
fi

cd "$root"
python -m pytest -q tests/engines/test_graphs.py | tee "$out/tests.txt"

quickstart=$root/examples/quickstart
python "$quickstart/preprocess.py" apply "$quickstart/data" "$out" --models "$quickstart/models" >"$out/log" 2>&1
python scripts/widen.py "$quickstart/models/large.pt" "$out/large.pt" 4 --half
python scripts/widen.py "$quickstart/models/aligned.pt" "$out/aligned.pt" 2 --half

: >"$out/table.md"
for models in "$quickstart/models" "$out"; do
    for precision in "" --fp16; do
        python scripts/benchmark.py "$out/data-bin" --cuda $precision --sentences "$sentences" --brief \
            --large "$models/large.pt" --small "$models/aligned.pt" --early-exit "$models/large.pt" \
            --reference "$quickstart/data/test.en" --lossless-fallback 0.25 --bild 0.25,2,end --exit 0.35,1 \
            --systems fairseq,greedy,lossless,bild,exit | tee -a "$out/table.md"
        echo | tee -a "$out/table.md"
    done
done
