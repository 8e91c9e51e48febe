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
# the comparison needs nothing but the ranking: it runs beside what follows, and is shown last
"$python" "$here/compare.py" --seeds "${SEEDS:-3}" > comparison.txt &
comparison=$!
trap 'kill "$comparison" 2>/dev/null || true' ERR INT TERM
run merge --method uniform
run tune --method learned
run eval tuned merged

wait "$comparison"
printf '\nAll methods, five scans of each digit, %s seeds:\n' "${SEEDS:-3}"
cat comparison.txt
printf '\nEverything is in %s\n' "$work"
