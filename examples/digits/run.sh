#!/usr/bin/env bash
# The main job on real scans: embed the pool, rank it for the target X, merge, tune, score, compare.
# Writes into a new folder (or the one given), so it can run again and again.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
work=${1:-$(mktemp -d "${TMPDIR:-/tmp}/pimerge-digits.XXXXXX")}
mkdir -p "$work"
for part in base data tasks experts; do ln -sfn "$here/$part" "$work/$part"; done
cd "$work"
export OMP_NUM_THREADS=1  # the model is tiny: a second thread costs more than it gains
python=${PYTHON:-python}
run() { printf '\n$ pimerge %s\n' "$*"; "$python" -m pimerge "$@"; }

run embed ./experts
run rank --target X -k 2
# the comparison needs nothing but the ranking: it runs beside what follows, and is shown last; X has five scans of each
# digit to train on, so further draws come from a split of their own. The learning rates are the best of 0.001, 0.003,
# 0.01 and 0.02 on another target, all ten digits rotated.
"$python" -m pimerge compare --target X --draw-from draws --shots 5 --seeds "${SEEDS:-3}" -q \
  --controls head,scratch,single,uniform --methods learned,interpolated,guided \
  --lr head=0.02 --lr scratch=0.01 --lr single=0.003 --lr uniform=0.01 --lr learned=0.003 --lr interpolated=0.003 \
  > comparison.txt &
comparison=$!
trap 'kill "$comparison" 2>/dev/null || true' ERR INT TERM
run merge --method uniform
run tune --method learned
run eval tuned merged

wait "$comparison"
printf '\nMethods and controls, each seed with another five scans of each digit:\n'
cat comparison.txt
printf '\nEverything is in %s\n' "$work"
