#!/usr/bin/env bash
# Makes the models of the quickstart from nothing: data, training, averaging, alignment, export. About three
# and a half hours on two cores.
#
#   bash train.sh WORKDIR [PACKAGES]
#
# PACKAGES is a folder with the two LibreOffice help .deb files; without it apt-get downloads them.
# The results are WORKDIR/models and WORKDIR/test. A finished step is not repeated, and an
# interrupted training goes on from its last epoch.
set -euo pipefail

if [[ $# -lt 1 || $# -gt 2 ]]; then
    echo "usage: train.sh WORKDIR [PACKAGES]" >&2
    exit 2
fi
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
plugin=$(cd "$here/../.." && pwd)/bild_fairseq
work=$1
packages=${2:-}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)}

if ! python -c 'import fairseq, sacremoses, subword_nmt'; then
    echo "train.sh: the active Python lacks the package named above: see the README" >&2
    exit 1
fi

step() {
    echo "== $*"
}

# train NAME OPTIONS...: a fairseq-train run with the options that all models share.
train() {
    local name=$1
    shift
    step "training the $name model"
    python -m fairseq_cli.train "$work/data/data-bin" \
        --user-dir "$plugin" --save-dir "$work/$name" \
        --source-lang de --target-lang en --cpu --num-workers 0 --seed 1 \
        --share-all-embeddings --encoder-normalize-before --decoder-normalize-before \
        --encoder-attention-heads 4 --decoder-attention-heads 4 \
        --max-source-positions 512 --max-target-positions 512 \
        --optimizer adam --adam-betas '(0.9, 0.98)' --clip-norm 1.0 \
        --lr-scheduler polynomial_decay --label-smoothing 0.1 \
        --max-tokens 1280 --required-batch-size-multiple 1 \
        --skip-invalid-size-inputs-valid-test \
        --keep-last-epochs 5 --no-progress-bar --log-interval 50 "$@"
}

large=(
    --encoder-layers 3 --encoder-embed-dim 256 --encoder-ffn-embed-dim 1024
    --decoder-layers 6 --decoder-embed-dim 256 --decoder-ffn-embed-dim 1024
)
small=(
    --encoder-layers 2 --encoder-embed-dim 128 --encoder-ffn-embed-dim 512
    --decoder-layers 1 --decoder-embed-dim 128 --decoder-ffn-embed-dim 512
)

if [[ ! -e $work/raw/test.en ]]; then
    step "extracting the parallel text"
    python "$here/extract_lohelp.py" "$work/raw" ${packages:+--packages "$packages"}
fi
if [[ ! -e $work/data/data-bin/test.de-en.en.idx ]]; then
    step "tokenizing and binarizing"
    python "$here/preprocess.py" learn "$work/raw" "$work/data"
fi

# export_model NAME OUT EPOCHS: the mean of a run's last epochs.
export_model() {
    python "$here/../common/export.py" "$work/$1" "$2" --average "$3"
}

train plain --arch transformer "${large[@]}" --criterion label_smoothed_cross_entropy \
    --dropout 0.15 --lr 1e-3 --warmup-updates 500 --total-num-update 4600 --max-epoch 8
export_model plain "$work/plain.pt" 2

# The large model that ships serves in both modes: the plain one, trained on with a head on its first decoder layer,
# which then gets a decoder layer of its own (below).
train early-exit --arch early_exit_transformer --exit-layers 1 "${large[@]}" \
    --finetune-from-model "$work/plain.pt" \
    --criterion early_exit_label_smoothed_cross_entropy --exit-distill 0.5 \
    --dropout 0.15 --lr 4e-4 --warmup-updates 100 --total-num-update 1100 --max-epoch 2
export_model early-exit "$work/early-exit.pt" 1

train small --arch transformer "${small[@]}" --criterion label_smoothed_cross_entropy \
    --dropout 0.1 --lr 2e-3 --warmup-updates 500 --total-num-update 4100 --max-epoch 8
export_model small "$work/models/small.pt" 2

step "giving the exit a layer of its own"
python "$plugin/../scripts/align.py" "$work/data/data-bin" --large "$work/early-exit.pt" --early-exit 1 \
    --exit-own-layers 1 --out "$work/exit.pt" --work "$work/exit" --report "$work/exit.json" \
    --cpu --distill 0.7 --sample 24000 --valid-sample 300 --epochs 3 --max-tokens 2000 --fallback 0.4 --rollback 1
python "$here/../common/export.py" "$work/exit/training" "$work/models/large.pt"

step "aligning the small model with the large one"
python "$plugin/../scripts/align.py" "$work/data/data-bin" --large "$work/early-exit.pt" \
    --small "$work/models/small.pt" --out "$work/models/aligned.pt" --work "$work/align" --report "$work/align.json" \
    --cpu --splice 40000 --distill 0.7 --distill-top 32 --epochs 6 --lr 2e-3 --max-tokens 2000 --half

cp "$work/data/codes" "$work"/data/data-bin/dict.{de,en}.txt "$work/models/"
mkdir -p "$work/test"
for language in de en; do
    head -n 300 "$work/raw/test.$language" > "$work/test/test.$language"
done
step "done: $work/models and $work/test"
