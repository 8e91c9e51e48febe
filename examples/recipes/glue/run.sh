#!/usr/bin/env bash
# T5-base on GLUE, each task the target of the others' experts by π-Tuning: arXiv 2304.14381, table 3.
set -euo pipefail
BASE=${BASE:-google-t5/t5-base}
TASKS=${TASKS:-cola sst2 mrpc qqp mnli qnli rte}
TARGETS=${TARGETS:-$TASKS}
EPOCHS=${EPOCHS:-5}
form=${FORM:---kind bottleneck --fresh-rank 128}
EXPERT=${EXPERT:-$form --epochs $EPOCHS --lr 1e-4 --batch-size 32}
RANK=${RANK:---measure fisher-raw -k 2}
SHOTS=${SHOTS:-all}
SEEDS=${SEEDS:-0 1 2}
METHODS=${METHODS:-scratch --method scratch $form --epochs $((2 * EPOCHS)) --lr 1e-4 --batch-size 32
pi-tuning --method interpolated --start equal --epochs $EPOCHS --lr 1e-4 --batch-size 32}
source "$(dirname "$0")/../pipeline.sh"
