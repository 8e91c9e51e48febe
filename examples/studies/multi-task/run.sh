#!/usr/bin/env bash
# One LoRA on the union of the upstream tasks, or one expert for each of them, composed? Upstream: inverted, rotated and
# outlined scans of 0 to 6; the target: inverted scans of all ten digits.
#
#   POOL    experts; UNION   the expert of the union of their tasks
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
if [ -z "$own" ]; then
  cut_tasks union:inverted+rotated+outlined:0-6:train
  expert union/all tasks/union
  POOL="$digits/experts/inverted-0-6 $digits/experts/rotated-0-6 $digits/experts/outlined-0-6" UNION=union
  TARGET=$digits/experts/X DRAW_FROM=draws
fi
: "${UNION:?UNION is not set: the expert that was trained on the union of the tasks of POOL}"

compare composed learned scratch,single,uniform --experts "${EXPERTS:-3}" ${DRAW_FROM:+--draw-from "$DRAW_FROM"}
POOL=$UNION
compare union "" single --experts 1 ${DRAW_FROM:+--draw-from "$DRAW_FROM"}
table scratch "an expert each=composed.json" "one on the union=union.json"
