# WMT 2014 German-English. Read by run.sh; each list holds flags of the program that is named.
# shellcheck disable=SC2034

kind=translation
source_language=de
target_language=en
metric=bleu

# How many sentences are measured: all of newstest2013 and newstest2014.
valid_sentences=3000
test_sentences=3003
sweep_sentences=300

# examples/common/preprocess.py. As in fairseq's prepare-wmt14en2de.sh, but with its Transformers' 32,000 merges and
# joint dictionary.
preprocess=(--merges 32000 --joined-dictionary --normalize-punctuation --longest 250 --ratio 1.5)

# fairseq-train. The recipe of fairseq's examples/scaling_nmt/README.md: there for one GPU with --max-tokens 3584, and
# --update-freq 16 on 8 GPUs with a learning rate of 0.001 for big batches. On one GPU, --update-freq 32 and 20,000
# updates see what 4 GPUs see with --update-freq 8.
recipe=(
    --optimizer adam --adam-betas '(0.9, 0.98)' --clip-norm 0.0 --weight-decay 0.0
    --lr 0.0007 --lr-scheduler inverse_sqrt --warmup-updates 4000 --warmup-init-lr 1e-07
    --max-tokens 3584 --update-freq 32 --label-smoothing 0.1 --share-all-embeddings
)
large=(
    --arch transformer_vaswani_wmt_en_de_big --dropout 0.3 "${recipe[@]}"
    --criterion label_smoothed_cross_entropy --max-update 20000
)
small=(
    --arch transformer_wmt_en_de --dropout 0.1 "${recipe[@]}" --encoder-layers 3 --decoder-layers 1
    --criterion label_smoothed_cross_entropy --max-update 20000
)
# The large model trained on with a head on its first decoder layer; the loss is the paper's, the mean over both exits.
early_exit=(
    --arch early_exit_transformer_vaswani_wmt_en_de_big --exit-layers 1 --dropout 0.3 "${recipe[@]}"
    --criterion early_exit_label_smoothed_cross_entropy --max-update 5000
)
# Checkpoints of the last epochs that are averaged.
average=5

# scripts/align.py, and fairseq-train behind its --. One million sentences of 4.5.
align=(--sample 1000000 --epochs 3)
align_train=()

# How text is generated: limits as fairseq-generate has them.
search=()
# scripts/sweep.py and scripts/calibrate.py
sweep=(--fallback 0.2,0.3,0.4,0.5,0.6,0.8,0.9 --rollback 1,2,3,5,7 --ablations)
calibrate=()

# MODELS=paper (../common/paper.sh): the large, the small and the aligned small model of the paper's authors.
paper_models=(mT5-large-wmt2014-de-en mT5-small-wmt2014-de-en mT5-small-wmt2014-de-en-bild-aligned)
