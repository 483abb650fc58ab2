# What the benchmarks of summarization share: fairseq's BART. Sourced by their settings.sh, which have set
#   bart          fairseq's fine-tuned model
#   updates       of the large and the small model's training
#   update_freq   batches an update
# shellcheck disable=SC2034,SC2154

kind=summarization
source_language=source
target_language=target
sweep_sentences=200

# examples/common/preprocess.py: articles are cut where BART's positions end.
preprocess=(--longest 1022)

# The large model is fairseq's as released. With LARGE_ARCHIVE= (empty) train-large runs fairseq-train with `large`
# instead: add --finetune-from-model bart.large/model.pt.
large_archive=${LARGE_ARCHIVE-$bart}

# fairseq-train. The recipe of fairseq's examples/bart/README.summarization.md, there for 8 GPUs.
recipe=(
    --optimizer adam --adam-betas '(0.9, 0.999)' --adam-eps 1e-08 --clip-norm 0.1 --weight-decay 0.01
    --lr-scheduler polynomial_decay --warmup-updates 500 --max-tokens 2048 --update-freq "$update_freq"
    --dropout 0.1 --attention-dropout 0.1 --label-smoothing 0.1
    --layernorm-embedding --share-all-embeddings --share-decoder-input-output-embed
)
large=(
    --arch bart_large "${recipe[@]}" --lr 3e-05 --total-num-update "$updates" --max-update "$updates"
    --criterion label_smoothed_cross_entropy
)
# The small model starts as 6 of the large one's 12 encoder layers and 1 of its 12 decoder layers (shrink.py): a
# shallow decoder with the same dictionary. It has more to learn than a model that is only fine-tuned.
small_layers=(--encoder-layers "${SMALL_ENCODER_LAYERS:-6}" --decoder-layers "${SMALL_DECODER_LAYERS:-1}")
small=(
    --arch bart_large "${small_layers[@]}" "${recipe[@]}" --lr 1e-04
    --total-num-update "$updates" --max-update "$updates" --criterion label_smoothed_cross_entropy
)
# The large model trained on with a head on its second decoder layer; the loss is the paper's, the mean over both exits.
early_exit=(
    --arch early_exit_bart_large --exit-layers 2 "${recipe[@]}" --lr 3e-05 --total-num-update 5000 --max-update 5000
    --criterion early_exit_label_smoothed_cross_entropy
)
# Checkpoints of the last epochs that are averaged; 0: the best one is taken, as in that recipe.
average=0

# scripts/align.py, and fairseq-train behind its --.
align=(--sample 100000 --epochs 2 --lr 3e-5 --max-tokens 2048)
align_train=(--update-freq "$update_freq")

# scripts/calibrate.py
calibrate=()
