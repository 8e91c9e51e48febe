#!/usr/bin/env bash
# How well does the nearest expert do, with its head and without training? Five looks of the same five digits:
# each is the target once, and the experts of the others are ranked for it.
#
#   POOL      tasks with the same classes; an expert is trained for each, and each is the target once
#   TARGET    the task among them that the head of the bare base is trained on
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
if [ -z "$own" ]; then
  cut_tasks plain:plain:0-4:train noisy:noisy:0-4:train inverted:inverted:0-4:train rotated:rotated:0-4:train \
    outlined:outlined:0-4:train
  POOL="tasks/plain tasks/noisy tasks/inverted tasks/rotated tasks/outlined" TARGET=tasks/plain
fi

for task in $POOL; do expert "experts/$(basename "$task")" "$task"; done
[ -d bare ] || run tune --method head --target "$TARGET" --base "$BASE" --epochs "$EPOCHS" --output bare --quiet
run embed experts --quiet
for task in $POOL; do
  name=$(basename "$task")
  run rank --target "$name" --shots "$SHOTS" --no-gate --output "$name.ranking.json" --force --quiet
  run eval experts/* bare --target "$task" --base "$BASE" --output "$name.scores.json" --force --quiet
done
"$python" "$studies/zero-shot/nearest.py" *.scores.json | tee table.md
