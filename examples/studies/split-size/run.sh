#!/usr/bin/env bash
# How much data do the upstream experts need? Each is trained on a tenth, a third and all of its task's examples.
#
#   POOL    tasks; an expert of every size is trained for each
#   SIZES   examples per class; all
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
[ -n "$own" ] ||
  POOL="$digits/tasks/inverted-0-6 $digits/tasks/inverted-3-9" TARGET=$digits/experts/X DRAW_FROM=draws

tasks=$POOL controls=scratch,uniform documents=()
for size in ${SIZES:-6 20 all}; do
  few=()
  [ "$size" = all ] || few=(--shots "$size")
  for task in $tasks; do expert "experts-$size/$(basename "$task")" "$task" ${few[@]+"${few[@]}"}; done
  POOL=experts-$size
  compare "size-$size" learned "$controls" ${DRAW_FROM:+--draw-from "$DRAW_FROM"}
  documents+=("upstream $size=size-$size.json")
  controls=uniform  # a fresh LoRA is the same, whatever the pool
done
table scratch "${documents[@]}"
