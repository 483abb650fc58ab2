# XSUM. Read by run.sh; each list holds flags of the program that is named.
# shellcheck disable=SC2034

kind=summarization
source_language=source
target_language=target
metric=${METRIC:-rougeL}

# How many articles are measured.
valid_sentences=11332
test_sentences=11334
sweep_sentences=200

# examples/common/preprocess.py: articles are cut where BART's positions end.
preprocess=(--longest 1022)

# The large model is fairseq's bart.large.xsum as released. With LARGE_ARCHIVE= (empty) train-large runs fairseq-train
# with `large` instead: add --finetune-from-model bart.large/model.pt.
large_archive=${LARGE_ARCHIVE-bart.large.xsum}

# fairseq-train. The recipe of fairseq's examples/bart/README.summarization.md, there for 8 GPUs.
recipe=(
    --optimizer adam --adam-betas '(0.9, 0.999)' --adam-eps 1e-08 --clip-norm 0.1 --weight-decay 0.01
    --lr-scheduler polynomial_decay --warmup-updates 500 --max-tokens 2048 --update-freq 2
    --dropout 0.1 --attention-dropout 0.1 --label-smoothing 0.1
    --layernorm-embedding --share-all-embeddings --share-decoder-input-output-embed
)
large=(
    --arch bart_large "${recipe[@]}" --lr 3e-05 --total-num-update 15000 --max-update 15000
    --criterion label_smoothed_cross_entropy
)
# The small model starts as 6 of the large one's 12 encoder layers and 1 of its 12 decoder layers (shrink.py): a
# shallow decoder with the same dictionary. It has more to learn than a model that is only fine-tuned.
small_layers=(--encoder-layers "${SMALL_ENCODER_LAYERS:-6}" --decoder-layers "${SMALL_DECODER_LAYERS:-1}")
small=(
    --arch bart_large "${small_layers[@]}" "${recipe[@]}" --lr 1e-04 --total-num-update 15000 --max-update 15000
    --criterion label_smoothed_cross_entropy
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
align_train=(--update-freq 2)

# How text is generated: the limits of fairseq's examples/bart/summarize.py, greedily as in the paper.
search=(--max-len-b 60 --min-len 10 --no-repeat-ngram-size 3)
# scripts/sweep.py and scripts/calibrate.py
sweep=(--fallback 0.2,0.3,0.4,0.5,0.6 --rollback 1,2,3,5 --ablations)
calibrate=()

# MODELS=paper (../common/paper.sh): the large, the small and the aligned small model of the paper's authors.
paper_models=(T5-large-xsum T5-small-xsum T5-small-xsum-bild-aligned)
# T5's prefix. The limits, in pieces, are the authors'.
paper_preprocess=(--prefix 'summarize: ' --longest 1024 --longest-target 128)
# A head on the first of T5-small's 6 decoder layers; the loss is the mean of both. The paper has this for translation
# only.
# Adafactor at a constant rate with batches of 16, as in the public reproduction's trainings of mT5-small, but fewer
# updates: training starts from the authors' fine-tuned model.
paper_early_exit=(
    --arch early_exit_t5_small --exit-layers 1 --dropout 0.1
    --optimizer adafactor --lr 2e-4 --lr-scheduler fixed --clip-norm 1.0
    --criterion early_exit_label_smoothed_cross_entropy --label-smoothing 0
    --batch-size 4 --update-freq 4 --max-update 50000
)
