#!/usr/bin/env bash
# Flan-T5-large on four question-answering data sets, each the target of the others' LoRA experts: arXiv 2402.15414, table 2.
set -euo pipefail
BASE=${BASE:-google/flan-t5-large}
TASKS=${TASKS:-arc sciq commonsense-qa quail}
TARGETS=${TARGETS:-$TASKS}
EPOCHS=${EPOCHS:-5}
EXPERT=${EXPERT:---modules q,k,v --fresh-rank 16 --epochs $EPOCHS --lr 3e-4 --label-smoothing 0}
RANK=${RANK:---measure fisher -k 3}
SHOTS=${SHOTS:-5 20 50}
SEEDS=${SEEDS:-0 1 2}
few="--holdout 0 --label-smoothing 0 --epochs ${FEW_EPOCHS:-20}"
METHODS=${METHODS:-scratch --method scratch --lr 3e-4 $few
learned --method learned --start equal $few}
source "$(dirname "$0")/../pipeline.sh"
