#!/usr/bin/env bash
# ViT-B/32 (ImageNet-21k) on six image data sets, each the target of the others' LoRA experts: arXiv 2402.15414, tables 6, 7.
set -euo pipefail
BASE=${BASE:-google/vit-base-patch32-224-in21k}
TASKS=${TASKS:-cifar100 food101 flowers eurosat cars sun397}
TARGETS=${TARGETS:-$TASKS}
EPOCHS=${EPOCHS:-5}
EXPERT=${EXPERT:---modules q_proj,k_proj,v_proj --fresh-rank 16 --epochs $EPOCHS --lr 1e-3 --batch-size 64}
RANK=${RANK:---measure fisher -k 5}
SHOTS=${SHOTS:-1 5 20}
SEEDS=${SEEDS:-0 1 2}
few="--holdout 0 --epochs ${FEW_EPOCHS:-30}"
METHODS=${METHODS:-head --method head $few
scratch --method scratch --lr 1e-3 $few
uniform --method uniform $few
learned --method learned --start equal $few}
source "$(dirname "$0")/../pipeline.sh"
