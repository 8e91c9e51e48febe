#!/usr/bin/env bash
# Do the learned weights find the experts that saw the target's classes? Ten digits are split over three experts, and
# targets take classes of one of them or of two. The weights start equal.
#
#   POOL     experts, by their own folders
#   TARGET   tasks, with spaces between
set -euo pipefail
SHOTS=${SHOTS:-15}
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
if [ -z "$own" ]; then
  cut_tasks low:inverted:0-2:train middle:inverted:3-5:train high:inverted:6-9:train \
    only-low:inverted:0-2:few+draws only-middle:inverted:3-5:few+draws only-high:inverted:6-9:few+draws \
    low-and-middle:inverted:1-4:few+draws
  for task in low middle high; do expert "experts/$task" "tasks/$task"; done
  POOL="experts/low experts/middle experts/high"
  TARGET="tasks/only-low tasks/only-middle tasks/only-high tasks/low-and-middle"
fi

for target in $TARGET; do
  for ((seed = 0; seed < SEEDS; seed++)); do
    output=tuned/$(basename "$target")-$seed
    [ -d "$output" ] || run tune $POOL --method learned --start equal --target "$target" ${BASE:+--base "$BASE"} \
      --shots "$SHOTS" --seed "$seed" --epochs "$EPOCHS" --batch-size "$BATCH" --holdout 0 --output "$output" --quiet
  done
done
"$python" "$studies/entangled/weights.py" tuned/*/ | tee table.md
