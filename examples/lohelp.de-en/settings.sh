# German-English text of the LibreOffice help. Read by run.sh; each list holds flags of the program that is named.
# shellcheck disable=SC2034

kind=translation
source_language=de
target_language=en
metric=bleu

# What `all` runs: the models are there.
all_steps=(prepare align calibrate sweep evaluate figures table)

# How many sentences are measured: all.
valid_sentences=1000
test_sentences=1000
sweep_sentences=300

# The quickstart's models: the large one is also the early-exit one. A model that is trained here takes the place of the
# shipped one.
shipped_large=$here/../quickstart/models/large.pt
shipped_small=$here/../quickstart/models/small.pt
shipped_early_exit=$shipped_large

# The text comes from two Debian packages; PACKAGES may name a folder that has them.
extract() {
    run python "$quickstart/extract_lohelp.py" "$raw" ${PACKAGES:+--packages "$PACKAGES"}
    [[ -n ${DRY_RUN:-} ]] || is_the_models_text || say "this revision of the packages gives other parts than the one" \
        "that the shipped models were trained on: its test text may be their training text, so train models of your own"
}

is_the_models_text() {
    cmp -s <(head -n 300 "$raw/test.de") "$quickstart/data/test.de"
}

# examples/common/preprocess.py: codes and dictionaries of those models.
preprocess=(--models "$here/../quickstart/models" --longest 500 --ratio 3)

# fairseq-train; not needed with the shipped models. As in examples/quickstart/train.sh.
recipe=(
    --share-all-embeddings --encoder-normalize-before --decoder-normalize-before
    --encoder-attention-heads 4 --decoder-attention-heads 4 --max-source-positions 512 --max-target-positions 512
    --optimizer adam --adam-betas '(0.9, 0.98)' --clip-norm 1.0 --lr-scheduler polynomial_decay
    --label-smoothing 0.1 --max-tokens 1280 --num-workers 0
)
large_size=(
    --encoder-layers 3 --encoder-embed-dim 256 --encoder-ffn-embed-dim 1024
    --decoder-layers 6 --decoder-embed-dim 256 --decoder-ffn-embed-dim 1024
)
large=(
    --arch transformer "${large_size[@]}" "${recipe[@]}" --criterion label_smoothed_cross_entropy
    --dropout 0.15 --lr 1e-3 --warmup-updates 500 --total-num-update 4600 --max-epoch 8
)
small=(
    --arch transformer --encoder-layers 2 --encoder-embed-dim 128 --encoder-ffn-embed-dim 512
    --decoder-layers 1 --decoder-embed-dim 128 --decoder-ffn-embed-dim 512
    "${recipe[@]}" --criterion label_smoothed_cross_entropy
    --dropout 0.1 --lr 2e-3 --warmup-updates 500 --total-num-update 4100 --max-epoch 8
)
early_exit=(
    --arch early_exit_transformer --exit-layers 1 "${large_size[@]}" "${recipe[@]}"
    --criterion early_exit_label_smoothed_cross_entropy --exit-distill 0.5
    --dropout 0.15 --lr 4e-4 --warmup-updates 100 --total-num-update 1100 --max-epoch 2
)
# Checkpoints of the last epochs that are averaged.
average=2

# scripts/align.py, and fairseq-train behind its --.
align=(--splice 60000 --distill 0.5 --distill-top 32 --epochs 8 --lr 2e-3 --max-tokens 2000 --half)
align_train=()

# How text is generated: limits as fairseq-generate has them.
search=()
# scripts/sweep.py and scripts/calibrate.py
sweep=(--fallback 0.2,0.3,0.4,0.5,0.6,0.8 --rollback 1,2,3,5 --verify-end both --ablations)
calibrate=(--fallback 0.2,0.3,0.4,0.6 --rollback 1,2,3,5 --max-draft 6,10)
