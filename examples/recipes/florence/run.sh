#!/usr/bin/env bash
# Florence-2 on referring expressions, questions and captions, each the target of the others' experts by π-Tuning: arXiv 2304.14381.
set -euo pipefail
BASE=${BASE:-florence-community/Florence-2-base}
TASKS=${TASKS:-refcoco-plus refcocog vqa captions}
TARGETS=${TARGETS:-$TASKS}
EPOCHS=${EPOCHS:-3}
form=${FORM:---kind bottleneck --fresh-rank 128}
EXPERT=${EXPERT:-$form --epochs $EPOCHS --lr 1e-4}
RANK=${RANK:---measure fisher-raw -k 2}
SHOTS=${SHOTS:-all}
SEEDS=${SEEDS:-0}
METHODS=${METHODS:-scratch --method scratch $form --epochs $((2 * EPOCHS)) --lr 1e-4
pi-tuning --method interpolated --start equal --epochs $EPOCHS --lr 1e-4}
source "$(dirname "$0")/../pipeline.sh"
