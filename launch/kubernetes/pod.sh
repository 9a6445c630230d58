#!/bin/bash
# What a pod of a TrainJob runs: pod.sh SPEC RUN_FOLDER GRACE_SECONDS. torchrun reads nodes, rank and address from PET_*.
# A pod that is told to end (TERM, to this shell alone) hands it on: torchrun to its ranks, and they finish their step and save.
# It ends with 0 when the run is done, 75 when it was stopped and saved (started again), 2 to 5 when a person must mend
# something (not started again), else 1 (started again, from the newest checkpoint).
set -uo pipefail
spec=$1 folder=$2 grace=$3
project=$(cd -- "$(dirname -- "$0")/../.." && pwd)
stopped_before=$(stat -c %Y.%s -- "$folder/stopped" 2>/dev/null)

# torchrun leaves the first error of its ranks there, and `kubectl describe pod` shows it.
export TORCHELASTIC_ERROR_FILE=${ERROR_FILE:-/dev/termination-log}
python -m torch.distributed.run --shutdown-timeout="$grace" "$project/launch/train.py" "spec=$spec" &
launcher=$!
trap 'kill -TERM "$launcher" 2>/dev/null' TERM
wait "$launcher"
code=$?
while (( code > 128 )) && kill -0 "$launcher" 2>/dev/null; do  # the trap ended the wait, not torchrun
  wait "$launcher"
  code=$?
done

[[ -e $folder/done ]] && exit 0
if [[ -e $folder/stopped && $(stat -c %Y.%s -- "$folder/stopped") != "$stopped_before" ]]; then
  exit 75
fi
(( code == 0 )) && exit 0  # a pod of other ranks, which does not see the files of the first one yet
exit "$(python -c '
import json, sys
try:
    with open(sys.argv[1], encoding="utf-8") as file:
        code = json.load(file)["message"]["errorCode"]
except (OSError, ValueError, KeyError, TypeError):
    code = 1
print(code if code in (2, 3, 4, 5) else 1)
' "$TORCHELASTIC_ERROR_FILE")"
