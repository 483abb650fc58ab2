#!/usr/bin/env bash
# Translates held-out German sentences with the two models in models/ and compares BiLD with what
# else one could run: fairseq's own decoder, the large model alone, the small model alone.
#
#   bash run.sh [SENTENCES]
#
# SENTENCES (default 150, at most 300) are timed. Needs Python 3.10 to 3.12; makes a virtual
# environment and installs what is missing if none is active.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
sentences=${1:-150}
threads=${OMP_NUM_THREADS:-2}
export OMP_NUM_THREADS=$threads

# shellcheck source=../../scripts/setup.sh
source "$root/scripts/setup.sh"
setup_python

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

echo "== Tokenizing and binarizing the test sentences"
python "$here/preprocess.py" apply "$here/data" "$work" --models "$here/models" >"$work/log" 2>&1 ||
    { cat "$work/log" >&2; exit 1; }

echo "== Translating with BiLD: a few of the sentences"
fairseq-generate "$work/data-bin" --user-dir "$root/bild_fairseq" --cpu --batch-size 32 \
    --path "$here/models/large.pt" --generator bild --bild-small-path "$here/models/small.pt" \
    --remove-bpe >"$work/out" 2>"$work/log" || { cat "$work/log" >&2; exit 1; }
for id in 0 3 5; do
    paste -d'\t' <(echo German) <(sed -n "$((id + 1))p" "$here/data/test.de")
    grep "^D-$id	" "$work/out" | cut -f3 | sacremoses -q -l en detokenize 2>/dev/null | sed 's/^/BiLD\t/'
done
echo
tail -n 5 "$work/log"

echo
echo "== Measuring: every system on the same $sentences sentences, in turns"
python "$root/scripts/benchmark.py" "$work/data-bin" --sentences "$sentences" --threads "$threads" \
    --large "$here/models/large.pt" --small "$here/models/small.pt" --early-exit "$here/models/large.pt" \
    --reference "$here/data/test.en" --lossless-fallback 0.25 --bild 0.6,2 --bild 0.2,2,end --exit 0.6,2 --exit 0.2,1,end \
    --precision float32,int8 \
    --systems fairseq,greedy,small,bild,lossless,exit-alone,exit,exit-lossless 2>"$work/log" ||
    { cat "$work/log" >&2; exit 1; }
