#!/usr/bin/env bash
# How many experts should π-Tuning use besides the target's own?
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
[ -n "$own" ] || POOL=$digits/experts TARGET=$digits/experts/X DRAW_FROM=draws

compare auxiliaries interpolated scratch --experts "${EXPERTS:-1,2,3,4}" ${DRAW_FROM:+--draw-from "$DRAW_FROM"}
table scratch auxiliaries.json
