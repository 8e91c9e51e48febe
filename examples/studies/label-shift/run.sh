#!/usr/bin/env bash
# Do experts that saw the target's kind of image, but other classes, help? Upstream: inverted scans of 5 to 9.
set -euo pipefail
SHOTS=${SHOTS:-1,5} BATCH=${BATCH:-32}
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
RATES=${RATES-$FAR}
if [ -z "$own" ]; then
  cut_tasks target:inverted:0-4:few+draws five-seven:inverted:5-7:train seven-nine:inverted:7-9:train \
    five-nine:inverted:5-9:train
  for task in five-seven seven-nine five-nine; do expert "experts/$task" "tasks/$task"; done
  POOL=experts TARGET=tasks/target
fi

compare label-shift learned head,scratch,uniform --experts "${EXPERTS:-3}"
table scratch label-shift.json
