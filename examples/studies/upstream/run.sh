#!/usr/bin/env bash
# How many upstream experts should be composed? The first 1, 2, 4 and 8 of the ranking.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
[ -n "$own" ] || POOL=$digits/experts TARGET=$digits/experts/X DRAW_FROM=draws

compare upstream learned scratch,uniform --experts "${EXPERTS:-1,2,4,8}" ${DRAW_FROM:+--draw-from "$DRAW_FROM"}
table scratch upstream.json
