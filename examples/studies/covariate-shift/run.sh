#!/usr/bin/env bash
# Do experts that saw the target's classes in another look help? Upstream: rotated, outlined and noisy scans.
set -euo pipefail
SHOTS=${SHOTS:-1,5} BATCH=${BATCH:-32}
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
RATES=${RATES-$FAR}
if [ -z "$own" ]; then
  cut_tasks target:inverted:0-6:few+draws
  POOL="$digits/experts/rotated-0-6 $digits/experts/outlined-0-6 $digits/experts/noisy" TARGET=tasks/target
fi

compare covariate-shift learned head,scratch,uniform --experts "${EXPERTS:-3}"
table scratch covariate-shift.json
