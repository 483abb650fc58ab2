# MODELS=paper: the checkpoints of the paper's authors, T5 and mT5, instead of models that are trained here. Sourced by
# steps.sh, some of whose functions it replaces. All but raw text and downloads lies in WORK/paper.
#
#   PAPER_MODELS   folder that has the checkpoints, each in a folder of its name (default: DOWNLOADS, and what is not
#                  there is downloaded)
#
# A benchmark's settings.sh has
#   paper_models       names of the large, the small and the aligned small one
#   paper_preprocess   flags of preprocess.py: prefix and limits
#   paper_early_exit   flags of fairseq-train
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
early_exit=("${paper_early_exit[@]}")
whole=small
average=0
# T5 overflows in float16.
half=--bf16

encode_text() {
    convert_checkpoints
    run python "$common/preprocess.py" t5 "$raw" "$work/data" --languages "$source_language" "$target_language" \
        --model "$work/large" "${paper_preprocess[@]}" "$@"
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
