#!/usr/bin/env bash
# Translates held-out German sentences with the models in models/ and compares BiLD with what else one could run:
# fairseq's own decoder and the large model alone. Then the same once more at the cost of a much larger model.
#
#   bash run.sh [--all] [SENTENCES]
#
# SENTENCES (default 100, 5 to 300) are timed. With --all every system is timed, in float32 and in int8. Needs
# Python 3.10 to 3.12; makes a virtual environment and installs what is missing if none is active.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
all=
if [[ ${1:-} == --all ]]; then
    all=1
    shift
fi
sentences=${1:-100}
if (($# > 1)) || ! [[ $sentences =~ ^[1-9][0-9]{0,2}$ ]] || ((sentences < 5 || sentences > 300)); then
    echo "usage: bash run.sh [--all] [SENTENCES], a number from 5 to 300" >&2
    exit 2
fi
threads=${OMP_NUM_THREADS:-2}
export OMP_NUM_THREADS=$threads

# shellcheck source=../../scripts/setup.sh
source "$root/scripts/setup.sh"
setup_python

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
models=$here/models

# quietly COMMAND...: shows what a command prints only if it fails.
quietly() {
    "$@" >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }
}

# benchmark LARGE SMALL SENTENCES OPTIONS...
benchmark() {
    local large=$1 small=$2 count=$3
    shift 3
    python "$root/scripts/benchmark.py" "$work/data-bin" --large "$large" --small "$small" --early-exit "$large" \
        --sentences "$count" --threads "$threads" --reference "$here/data/test.en" --lossless-fallback 0.25 \
        --bild 0.25,2,end --exit 0.35,1 "$@"
}

echo "== Tokenizing and binarizing the test sentences"
quietly python "$here/preprocess.py" apply "$here/data" "$work" --models "$models"

echo "== Translating with BiLD: a few of the sentences"
fairseq-generate "$work/data-bin" --user-dir "$root/bild_fairseq" --cpu --batch-size 32 \
    --path "$models/large.pt" --generator bild --bild-small-path "$models/aligned.pt" \
    --bild-fallback-threshold 0.25 --bild-rollback-threshold 2 --bild-verify-end --bild-small-precision int8 --remove-bpe \
    >"$work/out" 2>"$work/log" || { cat "$work/log" >&2; exit 1; }
for id in 0 3 5; do
    paste -d'\t' <(echo German) <(sed -n "$((id + 1))p" "$here/data/test.de")
    grep "^D-$id	" "$work/out" | cut -f3 | sacremoses -q -l en detokenize 2>/dev/null | sed 's/^/BiLD\t/'
done
echo
tail -n 5 "$work/log"

echo
echo "== Measuring: every system on the same $sentences sentences, in turns"
if [[ -n $all ]]; then
    benchmark "$models/large.pt" "$models/aligned.pt" "$sentences" --precision float32,float32+int8,int8 \
        --systems fairseq,fairseq-beam5,greedy,small,bild,lossless,exit-alone,exit,exit-lossless
else
    benchmark "$models/large.pt" "$models/aligned.pt" "$sentences" --brief --precision float32+int8 \
        --systems fairseq,fairseq-beam5,greedy,lossless,bild,exit
fi

echo
echo "== The same text from models four times as wide (the cost of a transformer-big decoder), $((sentences / 5)) sentences"
quietly python "$root/scripts/widen.py" "$models/large.pt" "$work/large.pt" 4 --half
quietly python "$root/scripts/widen.py" "$models/aligned.pt" "$work/aligned.pt" 2 --half
benchmark "$work/large.pt" "$work/aligned.pt" "$((sentences / 5))" --brief --precision float32+int8 \
    --systems fairseq,greedy,lossless,bild,exit
