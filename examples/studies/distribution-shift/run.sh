#!/usr/bin/env bash
# Which method loses less when the images change after training? Trained on plain scans, also tested on other looks.
set -euo pipefail
SHOTS=${SHOTS:-20} BATCH=${BATCH:-32}
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
RATES=${RATES-$FAR}
if [ -z "$own" ]; then
  # no expert has seen the images of the tests
  cut_tasks target:plain:0-9:few+draws noisy:noisy:0-9:few rotated:rotated:0-9:few outlined:outlined:0-9:few
  POOL="$digits/experts/parity $digits/experts/loop $digits/experts/digits-0-4 $digits/experts/digits-5-9"
  TARGET=tasks/target ALSO="tasks/noisy tasks/outlined tasks/rotated"
fi
: "${ALSO:?ALSO is not set: tasks with the classes of TARGET, on whose test splits the results are also scored}"

compare distribution-shift learned head,scratch,full,uniform --experts "${EXPERTS:-3}" \
  $(printf -- '--also-test %s ' $ALSO)
table scratch distribution-shift.json
