# CNN/DailyMail. Read by run.sh; each list holds flags of the program that is named.
# shellcheck disable=SC2034

metric=${METRIC:-rougeLsum}

# How many articles are measured.
valid_sentences=13368
test_sentences=11490

# The large model and the trainings of ../common/bart.sh, which has the settings that both share.
bart=bart.large.cnn
updates=20000
update_freq=4
# shellcheck source=../common/bart.sh
source "$here/../common/bart.sh"

# How text is generated: the limits of fairseq's examples/bart/summarize.py, greedily as in the paper.
search=(--max-len-b 140 --min-len 55 --no-repeat-ngram-size 3)
# scripts/sweep.py
sweep=(--fallback 0.1,0.2,0.3,0.4,0.6 --rollback 1,3,6 --ablations)

# MODELS=paper (../common/paper.sh): the large, the small and the aligned small model of the paper's authors.
paper_models=(T5-large-cnndm T5-small-cnndm T5-small-cnndm-bild-aligned)
