# XSUM. Read by run.sh; each list holds flags of the program that is named.
# shellcheck disable=SC2034

metric=${METRIC:-rougeL}

# How many articles are measured.
valid_sentences=11332
test_sentences=11334

# The large model and the trainings of ../common/bart.sh, which has the settings that both share.
bart=bart.large.xsum
updates=15000
update_freq=2
# shellcheck source=../common/bart.sh
source "$here/../common/bart.sh"

# How text is generated: the limits of fairseq's examples/bart/summarize.py, greedily as in the paper.
search=(--max-len-b 60 --min-len 10 --no-repeat-ngram-size 3)
# scripts/sweep.py
sweep=(--fallback 0.2,0.3,0.4,0.5,0.6 --rollback 1,2,3,5 --ablations)

# MODELS=paper (../common/paper.sh): the large, the small and the aligned small model of the paper's authors.
paper_models=(T5-large-xsum T5-small-xsum T5-small-xsum-bild-aligned)
