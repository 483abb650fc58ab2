# The steps that all benchmarks share. Sourced by a benchmark's run.sh, which has set `here` and read settings.sh.
#
# Variables that a user may set:
#   WORK        folder for everything that the steps make (default: work/ beside run.sh)
#   RAW         folder with raw text of one's own, {train,valid,test}.{SOURCE,TARGET}, instead of a download
#   DOWNLOADS   folder where published archives are, or will be put (default: WORK/download)
#   LARGE, SMALL, ALIGNED, EARLY_EXIT   checkpoints to use instead of the ones trained here
#   GPT2_BPE    summarization: folder with encoder.json and vocab.bpe, instead of a download
#   MODELS=paper, PAPER_MODELS   the models of the paper's authors, and where they are; see paper.sh
#   SENTENCES   how many sentences are measured (default: the settings')
#   SUBSETS     parts of the data that `evaluate` measures (default: valid test)
#   RESULTS     folder for what is measured (default: WORK/results)
#   CPU=1       do not use a GPU
#   DRY_RUN=1   print the commands only
#
# Flags behind a step's name go to the program that the step runs, and win over the settings; those of `evaluate` and
# `calibrate` to each run of it, those of `figures` to rounds.py.

known_steps=(prepare train-large train-small align train-early-exit calibrate sweep evaluate figures table)
# A benchmark that starts from trained models says otherwise in its settings.
[[ -n ${all_steps[*]:-} ]] || all_steps=("${known_steps[@]}")
# The model that the early-exit model starts from, and half precision of fairseq-train on a GPU.
whole=large
half=--fp16
requirements=(examples/common/requirements.txt)
table_flags=()

root=$(cd "$here/../.." && pwd)
common=$root/examples/common
quickstart=$root/examples/quickstart
top=${WORK:-$here/work}
raw=$top/raw
downloads=${DOWNLOADS:-$top/download}
work=$top
[[ ${MODELS:-} != paper ]] || work=$top/paper
vocabulary=${GPT2_BPE:-$work/data/gpt2_bpe}
data=$work/data/data-bin
direction=(--source-lang "$source_language" --target-lang "$target_language")
results=${RESULTS:-$work/results}
threads=${OMP_NUM_THREADS:-$(nproc)}
export OMP_NUM_THREADS=$threads

say() {
    echo "== $*" >&2
}

fail() {
    echo "run.sh: $*" >&2
    exit 1
}

# run COMMAND...: shows a command so that it can be repeated by hand, and runs it.
run() {
    local word line=+
    for word in "$@"; do
        [[ $word =~ ^[[:alnum:]_./:,=@%+-]+$ ]] || printf -v word '%q' "$word"
        line+=" $word"
    done
    echo "$line" >&2
    [[ -n ${DRY_RUN:-} ]] || "$@"
}

unset gpu

# find_device: sets `gpu` to 1 or nothing, once.
find_device() {
    [[ -z ${gpu+known} ]] || return 0
    gpu=
    if [[ -z ${CPU:-} ]] && python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        gpu=1
    fi
}

need_data() {
    [[ -d $data || -n ${DRY_RUN:-} ]] || fail "no binarized data in $data: run 'bash run.sh prepare' first"
}

# find_model NAME: prints a checkpoint's path: the user's, else the one that was made here, else the one that ships.
find_model() {
    local name=$1 variable shipped path
    variable=$(tr 'a-z-' 'A-Z_' <<<"$name")
    shipped=shipped_${name//-/_}
    for path in "${!variable:-}" "$work/$name.pt" "${!shipped:-}"; do
        if [[ -n $path && -e $path ]]; then
            echo "$path"
            return
        fi
    done
    [[ -n ${DRY_RUN:-} ]] || return 1
    echo "${!shipped:-$work/$name.pt}"
}

# need_model NAME STEP: the same, and the step that makes the model is named if there is none.
need_model() {
    find_model "$1" || fail "no $1 model: run 'bash run.sh ${models_step:-$2}' first, or name a checkpoint in ${1^^}"
}

declare -F extract >/dev/null || extract() {
    run python "$common/extract.py" "$here" "$raw" --downloads "$downloads"
}

step_prepare() {
    get_raw_text
    encode_text "$@"
}

get_raw_text() {
    local part language complete=1
    for part in train valid test; do
        for language in "$source_language" "$target_language"; do
            [[ -e $raw/$part.$language ]] || complete=
        done
    done
    if [[ -n $complete ]]; then
        say "raw text is in $raw"
    elif [[ -n ${RAW:-} ]]; then
        run python "$common/corpus.py" "$RAW" "$raw" --languages "$source_language" "$target_language"
    else
        extract
    fi
}

# From raw text to binarized data.
encode_text() {
    local flags=()
    case $kind in
        translation) flags=(--languages "$source_language" "$target_language") ;;
        summarization) [[ -z ${GPT2_BPE:-} ]] || flags=(--vocabulary "$GPT2_BPE") ;;
    esac
    run python "$common/preprocess.py" "$kind" "$raw" "$work/data" "${flags[@]}" "${preprocess[@]}" "$@"
}

# train NAME FLAGS...: a fairseq-train run and its export to WORK/NAME.pt. An interrupted run goes on.
train() {
    local name=$1 device=(--cpu)
    shift
    if [[ -e $work/$name.pt ]]; then
        say "$work/$name.pt is there: remove it and $work/checkpoints/$name to train again"
        return
    fi
    need_data
    find_device
    [[ -z $gpu ]] || device=("$half")
    run python -m fairseq_cli.train "$data" --user-dir "$root/bild_fairseq" --save-dir "$work/checkpoints/$name" \
        --task translation "${direction[@]}" "${device[@]}" \
        --required-batch-size-multiple 1 --skip-invalid-size-inputs-valid-test --keep-last-epochs $((average > 1 ? average : 1)) \
        --no-progress-bar --log-interval 100 --seed 1 "$@"
    run python "$common/export.py" "$work/checkpoints/$name" "$work/$name.pt" --average "$average"
}

step_train_large() {
    if [[ -z ${large_archive:-} ]]; then
        train large "${large[@]}" "$@"
        return
    fi
    if [[ -e $work/large.pt ]]; then
        say "$work/large.pt is there"
        return
    fi
    run python "$common/release.py" "$large_archive" "$work/large.pt" --downloads "$downloads"
}

step_train_small() {
    local flags=() large_model
    if [[ -n ${small_layers[*]:-} && ! -e $work/small.pt ]]; then
        large_model=$(need_model large train-large)
        run python "$common/shrink.py" "$large_model" "$work/small-start.pt" "${small_layers[@]}"
        flags=(--finetune-from-model "$work/small-start.pt")
    fi
    train small "${flags[@]}" "${small[@]}" "$@"
}

step_train_early_exit() {
    local start
    start=$(need_model "$whole" "train-$whole")
    train early-exit --finetune-from-model "$start" "${early_exit[@]}" "$@"
}

# Sets `score`: how outputs of a part of the data become text, and what they are compared with.
set_score() {
    set_subwords
    score=(--metric "$metric" --reference "$raw/$1.$target_language" "${subwords[@]}")
}

set_subwords() {
    subwords=()
    if [[ $kind == summarization ]]; then
        subwords=(--bpe gpt2 --gpt2-encoder-json "$vocabulary/encoder.json" --gpt2-vocab-bpe "$vocabulary/vocab.bpe")
    fi
}

# Flags before -- are align.py's, those behind it fairseq-train's.
step_align() {
    local flags=() large_model small_model
    if [[ -e $work/aligned.pt ]]; then
        say "$work/aligned.pt is there; remove it to align again"
        return
    fi
    need_data
    large_model=$(need_model large train-large)
    small_model=$(need_model small train-small)
    find_device
    [[ -n $gpu ]] || flags=(--cpu)
    while [[ $# -gt 0 && $1 != -- ]]; do
        flags+=("$1")
        shift
    done
    [[ $# -eq 0 ]] || shift
    set_score valid
    run python "$root/scripts/align.py" "$data" "${direction[@]}" --large "$large_model" --small "$small_model" \
        --out "$work/aligned.pt" "${search[@]}" "${score[@]}" "${align[@]}" "${flags[@]}" -- "${align_train[@]}" "$@"
}

# Sets `measured`: data, device and sentences of a measuring program.
set_measured() {
    local subset=$1 sentences=$2
    need_data
    find_device
    set_score "$subset"
    measured=("$data" "${direction[@]}" --subset "$subset" --sentences "${SENTENCES:-$sentences}" --threads "$threads")
    [[ -z $gpu ]] || measured+=(--cuda)
    measured+=("${search[@]}" "${score[@]}")
}

# Sets `drafters`: those models that there are, as sweep.py takes them.
set_drafters() {
    local path
    drafters=()
    path=$(find_model small) && drafters+=(--small "unaligned=$path")
    path=$(find_model aligned) && drafters+=(--small "aligned=$path")
    path=$(find_model early-exit) && drafters+=(--early-exit "early exit=$path")
    [[ ${#drafters[@]} -gt 0 ]] || fail "no small model: run 'bash run.sh ${models_step:-train-small}' first"
}

# One run for every way to draft; what it has recorded is kept for a run with another --max-loss.
step_calibrate() {
    local method path large_model
    large_model=$(need_model large train-large)
    set_drafters
    set_measured valid "$sweep_sentences"
    [[ -n ${DRY_RUN:-} ]] || mkdir -p "$results"
    for method in unaligned aligned; do
        path=$(find_model "${method/unaligned/small}") || continue
        calibrate_one "$method" "$large_model" --small "$method=$path" "$@"
    done
    path=$(find_model early-exit) || return 0
    calibrate_one early-exit "$path" --early-exit "early exit=$path" "$@"
}

# calibrate_one NAME LARGE FLAGS...
calibrate_one() {
    local name=$1 large_model=$2
    shift 2
    run python "$root/scripts/calibrate.py" "${measured[@]}" --large "$large_model" "${calibrate[@]}" \
        --record "$results/calibrate-$name.record" --json "$results/calibrate-$name.json" "$@"
}

step_sweep() {
    local large_model
    large_model=$(need_model large train-large)
    set_drafters
    set_measured valid "$sweep_sentences"
    run python "$root/scripts/sweep.py" "${measured[@]}" --large "$large_model" "${drafters[@]}" \
        --out "$results/sweep" "${sweep[@]}" "$@"
}

# evaluate_one NAME MODELS... -- FLAGS...: benchmark.py, unless the same command has run since the models were made.
evaluate_one() {
    local name=$1 path models=() command current=1
    shift
    while [[ $1 != -- ]]; do
        models+=("$1")
        shift
    done
    shift
    command=$(printf '%q ' "${measured[@]}" "$@")
    [[ $(cat "$results/$name.command" 2>/dev/null) == "$command" ]] || current=
    for path in "${models[@]}"; do
        [[ $results/$name.json -nt $path ]] || current=
    done
    if [[ -n $current ]]; then
        say "$results/$name.json is there, and newer than the models"
        return
    fi
    if [[ -n ${DRY_RUN:-} ]]; then
        run python "$root/scripts/benchmark.py" "${measured[@]}" --json "$results/$name.json" "$@"
        return
    fi
    mkdir -p "$results"
    run python "$root/scripts/benchmark.py" "${measured[@]}" --json "$results/$name.json.tmp" "$@" |
        tee "$results/$name.txt.tmp"
    mv "$results/$name.txt.tmp" "$results/$name.txt"
    mv "$results/$name.json.tmp" "$results/$name.json"
    echo "$command" >"$results/$name.command"
}

# set_thresholds SUBSET METHOD: sets `thresholds`: the paper's on the validation set, and those that calibrate.py has
# found for the test set.
set_thresholds() {
    mapfile -t thresholds < <(
        python "$common/table.py" flags "$here/paper.json" "$results" --subset "$1" --method "$2"
    )
    [[ ${#thresholds[@]} -gt 0 ]] || exit 1
}

step_evaluate() {
    local subset count large_model small_model method
    large_model=$(need_model large train-large)
    set_drafters
    for subset in ${SUBSETS:-valid test}; do
        count=${subset}_sentences
        set_measured "$subset" "${!count}"
        for method in unaligned aligned; do
            small_model=$(find_model "${method/unaligned/small}") || continue
            set_thresholds "$subset" "$method"
            evaluate_one "$subset-$method" "$large_model" "$small_model" -- --large "$large_model" \
                --small "$small_model" --systems fairseq,greedy,small,bild "${thresholds[@]}" "$@"
        done
        small_model=$(find_model early-exit) || continue
        set_thresholds "$subset" early-exit
        evaluate_one "$subset-early-exit" "$small_model" -- --large "$small_model" --early-exit "$small_model" \
            --systems fairseq,greedy,exit-alone,exit "${thresholds[@]}" "$@"
    done
}

# Quality against time from the sweep; accepted drafts per call, and who wrote which token, of some sentences.
step_figures() {
    local large_model rounds=$results/rounds.json
    large_model=$(need_model large train-large)
    set_drafters
    set_measured valid 50
    [[ -n ${DRY_RUN:-} ]] || mkdir -p "$results"
    if [[ ! $rounds -nt $large_model || $# -gt 0 ]]; then
        run python "$root/scripts/rounds.py" "${measured[@]}" --large "$large_model" "${drafters[@]}" \
            --out "$rounds" "$@"
    fi
    run python "$root/scripts/plot.py" lengths "$rounds" --out "$results/lengths.png"
    run python "$root/scripts/plot.py" tokens "$rounds" --out "$results/tokens.html"
    if [[ ! -e $results/sweep/results.json && -z ${DRY_RUN:-} ]]; then
        fail "no sweep in $results/sweep to draw: run 'bash run.sh sweep' first"
    fi
    run python "$root/scripts/plot.py" curve "$results/sweep" --out "$results/quality-latency.png" --labels
    run python "$root/scripts/plot.py" curve "$results/sweep" --x speedup --out "$results/quality-speedup.png" --labels
}

step_table() {
    run python "$common/table.py" write "$here/paper.json" "$results" "${table_flags[@]}" "$@"
}

usage() {
    echo "usage: bash run.sh STEP [FLAGS...]   where STEP is one of ${known_steps[*]}, or all" >&2
    exit 2
}

main() {
    local step=${1:-} name
    [[ $# -gt 0 ]] || usage
    shift
    [[ " ${known_steps[*]} all " == *" $step "* ]] || usage
    [[ $step != all || $# -eq 0 ]] || fail "'all' takes no flags: give them to single steps"
    for name in LARGE SMALL ALIGNED EARLY_EXIT RAW GPT2_BPE PAPER_MODELS; do
        [[ -z ${!name:-} || -e ${!name} ]] || fail "$name=${!name}: there is no such file or folder"
    done
    # shellcheck source=../../scripts/setup.sh
    source "$root/scripts/setup.sh"
    setup_python "${requirements[@]}"
    if [[ -z ${DRY_RUN:-} ]]; then
        mkdir -p "$work" || fail "cannot make $work"
        # A work folder inside a repository is none of its content.
        [[ -e $top/.gitignore ]] || echo '*' >"$top/.gitignore"
    fi
    if [[ $step != all ]]; then
        "step_${step//-/_}" "$@"
        return
    fi
    for step in "${all_steps[@]}"; do
        say "$step"
        "step_${step//-/_}"
    done
}

case ${MODELS:-} in
    '') ;;
    # shellcheck source=paper.sh
    paper) source "$common/paper.sh" ;;
    *) fail "MODELS=$MODELS: must be 'paper', or nothing for models that are trained here" ;;
esac
