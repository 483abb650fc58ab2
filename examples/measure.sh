#!/usr/bin/env bash
# Measures two models at the size as trained and widened to larger ones; a table and a JSON file for each go to OUT.
#
#   bash examples/measure.sh DATA-BIN LARGE SMALL ALIGNED OUT [BENCHMARK OPTIONS...]
#
# SMALL is the small model as trained, ALIGNED the one that align.py made of it. The options, `--reference` for
# instance, go to every call of benchmark.py. Variables, with their defaults:
#   STEPS      which tables: quality trained base big precisions vocabulary batches passes figure
#   SENTENCES  that are timed: 100
#   THREADS    2
#   LOSSLESS   fallback threshold of lossless decoding: 0.25
#   BILD       thresholds of the other systems: 0.4,2
#   EARLY      an early-exit model, and EXIT, its thresholds (0.6,2): none
#   VOCAB      a file of types to draft among, for the table `vocabulary`, which is left out without it: none
# Widened models (scripts/widen.py) make the same predictions at the cost of a larger model. So `quality`, all
# sentences at the size as trained, holds for every size. What drafts does so in int8 (float32+int8), in the tables
# `quality` and `big` in float32 as well.
set -euo pipefail

if (($# < 5)); then
    sed -n 's/^# *bash/usage: bash/p' "${BASH_SOURCE[0]}" >&2
    exit 1
fi
scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")/../scripts" && pwd)
data=$1 large=$2 small=$3 aligned=$4 out=$5
shift 5
options=("$@")
threads=${THREADS:-2}
export OMP_NUM_THREADS=$threads

# widened MODEL TIMES: its path; the model is made if it is not there.
widened() {
    local made
    made=$out/$(basename "$1" .pt)-x$2.pt
    [[ -e $made ]] || python "$scripts/widen.py" "$1" "$made" "$2" --half >"$out/widen.log"
    echo "$made"
}

# table NAME TIMES SYSTEMS OPTIONS...: benchmark.py with the large model TIMES as wide.
table() {
    local name=$1 times=$2 systems=$3 early=${EARLY:-} wide=$large models
    shift 3
    models=(--small "unaligned=$small" --small "aligned=$aligned")
    if ((times > 1)); then
        wide=$(widened "$large" "$times")
        early=${early:+$(widened "$early" "$times")}
    fi
    if ((times == 4)); then # a larger model would have a larger small one beside it
        models+=(--small "aligned x2=$(widened "$aligned" 2)")
    fi
    echo "== $name"
    python "$scripts/benchmark.py" "$data" --large "$wide" "${models[@]}" ${early:+--early-exit "$early"} \
        --systems "$systems${early:+,exit,exit-lossless}" --threads "$threads" --sentences "${SENTENCES:-100}" \
        --lossless-fallback "${LOSSLESS:-0.25}" --bild "${BILD:-0.4,2}" --exit "${EXIT:-0.6,2}" \
        --precision float32+int8 \
        --json "$out/$name.json" "$@" "${options[@]}" | tee "$out/$name.md"
}

both=float32,float32+int8
step_quality() { table quality 1 fairseq,fairseq-beam5,greedy,bild --batch-size 32 --sentences 1000000 --precision "$both"; }
step_trained() { table trained 1 fairseq,greedy,lossless,bild --floor; }
step_base() { table base 2 fairseq,greedy,lossless,bild --floor; }
step_big() { table big 4 fairseq,greedy,lossless,bild --floor --precision "$both"; }
step_precisions() {
    table precisions 4 fairseq,greedy,lossless,bild --precision float32,float16,float16+int8,int8
}
step_vocabulary() {
    table vocabulary 4 greedy,lossless,bild --draft-vocab "${VOCAB:?name a file that align.py --draft-vocab has written}"
}
step_batches() {
    table batch-8 4 fairseq,greedy,lossless,bild --batch-size 8
    table batch-32 4 fairseq,greedy,lossless,bild --batch-size 32
}
step_passes() {
    echo "== passes"
    python "$scripts/passes.py" "$(widened "$large" 4)" --threads "1,$threads" | tee "$out/passes.md"
}
step_figure() {
    local name files=()
    for name in trained base big; do
        [[ ! -e $out/$name.json ]] || files+=("$out/$name.json")
    done
    python "$scripts/plot.py" sizes "${files[@]}" --out "$out/sizes.png"
}

steps=${STEPS:-quality trained base big precisions ${VOCAB:+vocabulary} batches passes figure}
for step in $steps; do
    if ! declare -F "step_$step" >/dev/null; then
        echo "measure: STEPS: no table is called $step" >&2
        exit 1
    fi
done
mkdir -p "$out"
for step in $steps; do
    "step_$step"
done
