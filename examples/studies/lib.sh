# What all studies share; each run.sh sources this first. These variables can be set from outside:
#
#   POOL     the experts: folders of experts or of pools, with spaces between
#   TARGET   the target task: its folder, or that of an expert of it
#   BASE     the base model, where it is not the experts' own
#   SHOTS    examples per class; SEEDS: samplings of them; EPOCHS: passes over them, in batches of BATCH
#   RATES    learning rates as METHOD=NUMBER, with spaces between; other methods have the defaults of 'pimerge tune'
#   RECIPE   options of 'pimerge tune --method scratch' that train an expert
#
# Without POOL and TARGET a study uses the digits. Results go to the given folder, otherwise to a new one. An interrupted run
# resumes when it is started again with that folder.
studies=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
digits=$(cd "$studies/../digits" && pwd)
python=${PYTHON:-python}
export OMP_NUM_THREADS=1  # the model is tiny: a second thread costs more than it gains
# chosen on another target, all ten digits rotated, 5 of each: as in examples/digits/run.sh, for a pool with related experts
# and batches of 16; and for a pool without them and batches of 32
NEAR="head=2e-2 scratch=1e-2 random=1e-2 single=3e-3 uniform=1e-2 learned=3e-3 interpolated=3e-3"
FAR="head=2e-2 scratch=2e-2 full=1e-3 uniform=2e-2 learned=2e-2"
# the recipe of the experts in examples/digits
RECIPE=${RECIPE---modules q_proj,v_proj --fresh-rank 4 --fresh-alpha 8 --epochs 20 --lr 5e-3 --batch-size 32}

run() { printf '\n$ pimerge %s\n' "$*"; "$python" -m pimerge "$@" < /dev/null; }

# absolute PATH ...: folders by their whole path, Hub ids unchanged
absolute() {
  local path
  for path; do if [ -d "$path" ]; then (cd "$path" && pwd); else printf '%s\n' "$path"; fi; done | paste -sd ' '
}

# cut_tasks NAME:LOOK:QUESTION:PARTS ...: tasks of the digits' scans (see examples/digits/cut.py)
cut_tasks() { [ -d tasks ] || "$python" "$digits/cut.py" tasks "$@"; }

# expert NAME TASK [OPTION ...]: train an expert of a task, unless it exists
expert() {
  local output=$1 task=$2
  shift 2
  [ -d "$output" ] ||
    run tune --method scratch --target "$task" --base "${BASE:?BASE is not set}" $RECIPE "$@" --output "$output" --quiet
}

# compare NAME METHODS CONTROLS [OPTION ...]: the pool for the target, into NAME.json
compare() {
  local name=$1 methods=$2 controls=$3 rate rates=()
  shift 3
  for rate in ${RATES-$NEAR}; do
    case ",$methods,$controls," in *",${rate%%=*},"*) rates+=(--lr "$rate") ;; esac
  done
  run compare $POOL --target "$TARGET" ${BASE:+--base "$BASE"} --shots "$SHOTS" --seeds "$SEEDS" --epochs "$EPOCHS" \
    --batch-size "$BATCH" --methods "$methods" --controls "$controls" ${rates[@]+"${rates[@]}"} "$@" \
    --output "$name.json" --force --quiet
}

# table AGAINST LABEL=NAME.json ...: comparisons side by side
table() {
  printf '\nTest accuracy, %%, mean ± sd over %s seeds; in brackets the paired difference to %s, 95 %%:\n\n' "$SEEDS" "$1"
  "$python" "$studies/table.py" --against "$@" | tee table.md
  printf '\nEverything is in %s\n' "$PWD"
}

if [ -n "${POOL:-}${TARGET:-}" ]; then
  : "${POOL:?POOL is not set: the experts for TARGET}" "${TARGET:?TARGET is not set: the task that POOL is for}"
  own=yes
  for name in POOL TARGET BASE ALSO UNION; do
    [ -z "${!name:-}" ] || printf -v "$name" %s "$(absolute ${!name})"
  done
else
  BASE=$digits/base own=
fi
SHOTS=${SHOTS:-5} SEEDS=${SEEDS:-3} EPOCHS=${EPOCHS:-30} BATCH=${BATCH:-16}
work=${1:-$(mktemp -d "${TMPDIR:-/tmp}/pimerge-$(basename "$(cd "$(dirname "$0")" && pwd)").XXXXXX")}
mkdir -p "$work"
cd "$work"
