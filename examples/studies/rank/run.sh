#!/usr/bin/env bash
# Which rank should the upstream experts have? Each is trained at rank 1, 2, 4 and 8, alpha twice the rank.
#
#   POOL    tasks; an expert of every rank is trained for each
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
[ -n "$own" ] ||
  POOL="$digits/tasks/inverted-0-6 $digits/tasks/inverted-3-9" TARGET=$digits/experts/X DRAW_FROM=draws

tasks=$POOL documents=()
for rank in ${RANKS:-1 2 4 8}; do
  for task in $tasks; do
    expert "experts-$rank/$(basename "$task")" "$task" --fresh-rank "$rank" --fresh-alpha $((2 * rank))
  done
  POOL=experts-$rank
  compare "rank-$rank" learned scratch,uniform ${DRAW_FROM:+--draw-from "$DRAW_FROM"}  # a fresh LoRA has the same rank
  documents+=("rank $rank=rank-$rank.json")
done
table scratch "${documents[@]}"
