# MODELS=paper: the checkpoints of the paper's authors, T5 and mT5, instead of models that are trained here. Sourced by
# steps.sh, some of whose functions it replaces. All but raw text and downloads lies in WORK/paper.
#
#   PAPER_MODELS   folder that has the checkpoints, each in a folder of its name (default: DOWNLOADS, and what is not
#                  there is downloaded)
#
# A benchmark's settings.sh has `paper_models`, the names of the large, the small and the aligned small one: T5 for
# summarization, mT5 for translation.
# shellcheck disable=SC2034,SC2154

[[ -n ${paper_models[*]:-} ]] || fail "MODELS=paper: the paper has no models for this benchmark"

all_steps=(prepare train-early-exit calibrate sweep evaluate figures table)
models_step=prepare
shipped_large=$work/large/model.pt
shipped_small=$work/small/model.pt
shipped_aligned=$work/aligned/model.pt
requirements+=(examples/common/requirements-paper.txt)
table_flags=(--same-models)
# Greedy, as in the paper. The authors' limit is 128 tokens, of which one is the start symbol.
search=(--max-len-b 127)
whole=small
average=0
# T5 overflows in float16.
half=--bf16

case $kind in
summarization)
    prefix=(--prefix 'summarize: ')
    small_arch=t5_small batches=(--batch-size 4 --update-freq 4)
    ;;
translation)
    prefix=() # mT5 has none
    small_arch=mt5_small batches=(--batch-size 16)
    ;;
esac
# A head on the first decoder layer of the small model, of T5's 6 or mT5's 8; the loss is the mean of both. The paper
# has this for translation only.
# Adafactor at a constant rate with batches of 16, as in the public reproduction's trainings of mT5-small, but fewer
# updates: training starts from the authors' fine-tuned model.
early_exit=(
    --arch "early_exit_$small_arch" --exit-layers 1 --dropout 0.1
    --optimizer adafactor --lr 2e-4 --lr-scheduler fixed --clip-norm 1.0
    --criterion early_exit_label_smoothed_cross_entropy --label-smoothing 0
    "${batches[@]}" --max-update 50000
)

# The limits, in pieces, are the authors'.
encode_text() {
    convert_checkpoints
    run python "$common/preprocess.py" t5 "$raw" "$work/data" --languages "$source_language" "$target_language" \
        --model "$work/large" "${prefix[@]}" --longest 1024 --longest-target 128 "$@"
}

# Makes WORK/paper/{large,small,aligned}.
convert_checkpoints() {
    local folder=${PAPER_MODELS:-$downloads} flags=() roles=(large small aligned) names=() i
    for i in "${!roles[@]}"; do
        [[ -e $work/${roles[i]}/model.pt ]] || names[i]=${paper_models[i]}
    done
    if [[ ${#names[@]} -eq 0 ]]; then
        say "the paper's models are in $work"
        return
    fi
    [[ -z ${PAPER_MODELS:-} ]] || flags=(--no-download)
    run python "$common/checkpoints.py" "${names[@]}" --folder "$folder" "${flags[@]}"
    for i in "${!names[@]}"; do
        run rm -rf "$work/${roles[i]}.tmp"
        run python "$root/scripts/convert_t5.py" "$folder/${names[i]}" "$work/${roles[i]}.tmp"
        run mv "$work/${roles[i]}.tmp" "$work/${roles[i]}"
    done
}

set_subwords() {
    subwords=(--bpe sentencepiece --sentencepiece-model "$work/large/spiece.model")
}

step_train_large() {
    fail "MODELS=paper: 'bash run.sh prepare' takes the authors' large and small models; they are not trained here"
}

step_train_small() {
    step_train_large
}
