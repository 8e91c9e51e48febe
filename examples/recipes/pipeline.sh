# The steps that all recipes share; a recipe's run.sh sets these variables and sources this file.
#
#   BASE      the base: a Hub id or a folder
#   TASKS     the tasks: folders in the recipe's tasks/; an expert is trained for each
#   TARGETS   the tasks that the other tasks' experts are combined for
#   EXPERT    options of 'pimerge tune' that train an expert of a task
#   RANK      options of 'pimerge rank'
#   SHOTS     training examples per class of a target: one or several numbers, or all
#   SEEDS     one run for each: another sampling of the shots, another order
#   METHODS   one line for each: a name and the options of 'pimerge tune'
#
# All can be set from outside, and so can the variables that a run.sh builds them from (EPOCHS, FEW_EPOCHS, FORM). Results
# go to the given folder, otherwise to the recipe's work/. An interrupted run resumes when it is started again.
here=$(cd "$(dirname "$0")" && pwd)
work=${1:-$here/work}
python=${PYTHON:-python}
run() { printf '\n$ pimerge %s\n' "$*"; "$python" -m pimerge "$@" < /dev/null; }

hub=${HF_ENDPOINT:-https://huggingface.co}
if [ ! -d "$BASE" ] && [ "${HF_HUB_OFFLINE:-0}" = 0 ] &&
  ! "$python" -c "import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=20)" "$hub" 2> /dev/null; then
  echo "error: $hub cannot be reached, and '$BASE' is not a folder" >&2
  echo "  → connect to the network, or set HF_HUB_OFFLINE=1 if model and data are already downloaded" >&2
  exit 3
fi
[ ! -d "$BASE" ] || BASE=$(cd "$BASE" && pwd)
mkdir -p "$work"
ln -sfn "$here/tasks" "$work/tasks"
cd "$work"
for task in $TASKS; do
  # the same --init-seed (0) for all, so that the experts can be compared parameter by parameter
  [ -d "experts/$task" ] || run tune --method scratch --target "tasks/$task" --base "$BASE" $EXPERT --output "experts/$task"
done
run embed experts

for target in $TARGETS; do
  mkdir -p "$target"
  cd "$target"
  run rank --target "$target" --store ../embeddings.json --no-gate $RANK -k 1 --output nearest.json --force
  run rank --target "$target" --store ../embeddings.json --no-gate $RANK --force
  run merge --method uniform --ranking nearest.json --output nearest --force
  run merge --method uniform --force
  outputs=(nearest merged)
  while read -r name options; do
    for shots in $SHOTS; do
      for seed in $SEEDS; do
        output=$name-$shots-$seed
        few=(--shots "$shots")
        [ "$shots" != all ] || few=()
        [ -d "$output" ] || run tune $options ${few[@]+"${few[@]}"} --seed "$seed" --output "$output"
        outputs+=("$output")
      done
    done
  done <<< "$METHODS"
  run eval "${outputs[@]}" "../experts/$target" --output scores.json --force
  cd ..
done

printf '\n%s, %s:\n\n' "$(basename "$here")" "$BASE"
"$python" "$here/../table.py" $(printf '%s/scores.json ' $TARGETS) | tee table.md
printf '\nEverything is in %s\n' "$work"
