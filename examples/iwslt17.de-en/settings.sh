# IWSLT 2017 German-English. Read by run.sh; each list holds flags of the program that is named.
# shellcheck disable=SC2034

kind=translation
source_language=de
target_language=en
metric=bleu

# How many sentences are measured: all of dev2010 and of tst2010 to tst2015.
valid_sentences=888
test_sentences=8079
sweep_sentences=300

# examples/common/preprocess.py. 10,000 merges as in fairseq's recipe for IWSLT 2014.
preprocess=(--merges 10000 --longest 175)

# fairseq-train. The recipe of fairseq's examples/translation/README.md for IWSLT 2014 German-English; epochs as in its
# recipe for IWSLT 2017.
recipe=(
    --optimizer adam --adam-betas '(0.9, 0.98)' --clip-norm 0.0 --weight-decay 0.0001
    --lr 5e-4 --lr-scheduler inverse_sqrt --warmup-updates 4000 --max-tokens 4096
    --label-smoothing 0.1 --share-decoder-input-output-embed
)
large=(
    --arch transformer_iwslt_de_en --dropout 0.3 "${recipe[@]}"
    --criterion label_smoothed_cross_entropy --max-epoch 50
)
# A sixth of the decoder's depth at half its width: its step costs a small part of the large model's.
small=(
    --arch transformer_iwslt_de_en --dropout 0.1 "${recipe[@]}"
    --encoder-layers 3 --encoder-embed-dim 256 --encoder-ffn-embed-dim 1024
    --decoder-layers 1 --decoder-embed-dim 256 --decoder-ffn-embed-dim 1024
    --criterion label_smoothed_cross_entropy --max-epoch 50
)
# The large model trained on with a head on its first decoder layer; the loss is the paper's, the mean over both exits.
early_exit=(
    --arch early_exit_transformer_iwslt_de_en --exit-layers 1 --dropout 0.3 "${recipe[@]}"
    --criterion early_exit_label_smoothed_cross_entropy --max-epoch 15
)
# Checkpoints of the last epochs that are averaged.
average=5

# scripts/align.py, and fairseq-train behind its --.
align=(--epochs 15)
align_train=()

# How text is generated: limits as fairseq-generate has them.
search=()
# scripts/sweep.py and scripts/calibrate.py
sweep=(--fallback 0.2,0.3,0.4,0.5,0.6,0.8,0.9 --rollback 1,2,3,4,6 --ablations)
calibrate=()

# MODELS=paper (../common/paper.sh): the large, the small and the aligned small model of the paper's authors.
paper_models=(mT5-large-iwslt2017-de-en mT5-small-iwslt2017-de-en mT5-small-iwslt2017-de-en-bild-aligned)
