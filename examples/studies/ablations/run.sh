#!/usr/bin/env bash
# What is π-Tuning's gain made of? The whole, only its weights trained, and fresh experts in place of the chosen ones.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
# examples/digits/experts/X saw other examples than those drawn here; as the target's own it has no part
[ -n "$own" ] || POOL=$digits/experts TARGET=$digits/experts/X DRAW_FROM=draws

compare ablations interpolated,learned scratch,random,uniform ${DRAW_FROM:+--draw-from "$DRAW_FROM"}
table scratch ablations.json
