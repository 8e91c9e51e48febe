#!/usr/bin/env bash
# What causes π-Tuning's gain? All of π-Tuning, only its weights trained, and fresh experts in place of the selected ones.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
# examples/digits/experts/X saw other examples than those sampled here, so it is not used as the target's own expert
[ -n "$own" ] || POOL=$digits/experts TARGET=$digits/experts/X DRAW_FROM=draws

compare ablations interpolated,learned scratch,random,uniform ${DRAW_FROM:+--draw-from "$DRAW_FROM"}
table scratch ablations.json
