#!/usr/bin/env bash
# The pipeline across modalities: embed a pool of vision, language and vision-language experts of two kinds, print the task
# graph, rank for a few-shot target in each modality, and compare π-Tuning with its controls.
# Writes into a new folder (or the one given), so it can run again and again.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
work=${1:-$(mktemp -d "${TMPDIR:-/tmp}/pimerge-multimodal.XXXXXX")}
mkdir -p "$work"
for part in base data tasks experts; do ln -sfn "$here/$part" "$work/$part"; done
cd "$work"
export OMP_NUM_THREADS=1  # the model is tiny: a second thread costs more than it gains
python=${PYTHON:-python}
run() { printf '\n$ pimerge %s\n' "$*"; "$python" -m pimerge "$@"; }

run embed ./experts --examples "${EXAMPLES:-200}"
printf '\nThe task graph:\n\n'
"$python" "$here/matrix.py"

rankings=()
for target in ${TARGETS:-v-inverted-unseen vl-inverted-even l-odd-or-even}; do
  run rank --target "tasks/$target" --shots 16 --output "$target.json"
  rankings+=("$target.json")
done
printf '\nTest accuracy, %%, from few examples, %s seeds:\n' "${SEEDS:-3}"
"$python" "$here/compare.py" "${rankings[@]}" --seeds "${SEEDS:-3}" --epochs "${EPOCHS:-30}"
printf '\nEverything is in %s\n' "$work"
