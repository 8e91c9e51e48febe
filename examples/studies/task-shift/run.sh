#!/usr/bin/env bash
# Do experts that were asked another question help? Upstream: parity and loops; the target: which digit, inverted.
set -euo pipefail
SHOTS=${SHOTS:-1,5} BATCH=${BATCH:-32}
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
RATES=${RATES-$FAR}
if [ -z "$own" ]; then
  cut_tasks target:inverted:0-9:few+draws
  POOL="$digits/experts/parity $digits/experts/loop $digits/experts/noisy-parity" TARGET=tasks/target
fi

compare task-shift learned head,scratch,uniform --experts "${EXPERTS:-3}"
table scratch task-shift.json
