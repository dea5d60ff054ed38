#!/usr/bin/env bash
# Create a Cloud TPU VM (or a slice of a pod), install the project on each of its hosts, and train.
#
#   PROJECT=my-project ZONE=us-central1-a launch/tpu_vm.sh --dry_run     print the commands
#   PROJECT=my-project ZONE=us-central1-a launch/tpu_vm.sh               run them
#   PROJECT=my-project ZONE=us-central1-a launch/tpu_vm.sh --check       before training, check every implementation of
#                                                                        attention (`attn check`) and fetch the results
#
# Variables: PROJECT, ZONE                       required
#            NAME=attn                           name of the TPU VM
#            ACCELERATOR_TYPE=v5litepod-8        v5litepod-N and v6e-N have N chips, v4-N and v5p-N half as many. Up to 8
#                                                chips of a v5e or v6e are one host, and 4 of a v4 or v5p; more are a
#                                                slice of several hosts, whose chips must divide the batch evenly
#            RUNTIME_VERSION                     default: the one of that type in Google's table of versions for JAX
#            REPOSITORY                          a git URL that the hosts can clone (default: origin of this repository)
#            TRAIN_ARGS="--config=configs/reverse.py"
#
# Training was compiled, not run, for 1, 4, 8, 16, 64 and 256 chips of a v5e, and 4 chips of a v4, v5p and v6e:
# see docs/accelerators.md.
# Types and versions: https://cloud.google.com/tpu/docs/runtimes
set -euo pipefail

usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; }
fail() { echo "error: $1" >&2; exit 2; }

dry_run=false check=false
for argument in "$@"; do
  case "$argument" in
    --dry_run) dry_run=true ;;
    --check) check=true ;;
    -h | --help) usage; exit 0 ;;
    *) fail "unknown argument '$argument'; known: --dry_run, --check, --help" ;;
  esac
done

origin=$(git -C "$(dirname "$0")" config --get remote.origin.url || true)
NAME=${NAME:-attn}
ACCELERATOR_TYPE=${ACCELERATOR_TYPE:-v5litepod-8}
REPOSITORY=${REPOSITORY:-$origin}
TRAIN_ARGS=${TRAIN_ARGS:---config=configs/reverse.py}
for variable in PROJECT ZONE REPOSITORY; do
  if [[ -z "${!variable:-}" ]]; then fail "$variable is not set; see launch/tpu_vm.sh --help"; fi
done

number=${ACCELERATOR_TYPE##*-}
[[ $number =~ ^[1-9][0-9]*$ ]] || fail "ACCELERATOR_TYPE: got $ACCELERATOR_TYPE, must end with a number, as v5litepod-8"
case "$ACCELERATOR_TYPE" in # the version; all chips, and those of a whole host
  v5litepod-*) version=v2-alpha-tpuv5-lite chips=$number host=8 ;;
  v6e-*) version=v2-alpha-tpuv6e chips=$number host=8 ;;
  v5p-*) version=v2-alpha-tpuv5 chips=$((number / 2)) host=4 ;;
  v4-*) version=tpu-ubuntu2204-base chips=$((number / 2)) host=4 ;;
  *) fail "ACCELERATOR_TYPE: got $ACCELERATOR_TYPE, must be v5litepod-N, v6e-N, v5p-N or v4-N" ;;
esac
if [[ $ACCELERATOR_TYPE == v5litepod-* || $ACCELERATOR_TYPE == v6e-* ]]; then
  sizes='^(1|4|8|16|32|64|128|256)$' words="1, 4, 8, 16, 32, 64, 128 or 256, the number of chips"
else
  sizes='^[1-9][0-9]{0,4}$' words="a multiple of 8, the number of cores"
fi
if ! [[ $number =~ $sizes ]] || ((host == 4 && number % 8)); then
  fail "ACCELERATOR_TYPE: got $ACCELERATOR_TYPE, must end with $words"
fi
RUNTIME_VERSION=${RUNTIME_VERSION:-$version}
if [[ $check == true ]] && ((chips > host)); then
  fail "--check: $ACCELERATOR_TYPE has several hosts; it needs one, of up to $host chips"
fi

# Print a command so that it can be pasted; run it unless this is a dry run.
run() {
  local word line=""
  for word in "$@"; do
    if [[ $word == *[!A-Za-z0-9_./:=-]* ]]; then word=${word@Q}; fi
    line+="$word "
  done
  echo "${line% }"
  if [[ $dry_run == false ]]; then "$@"; fi
}

location=("--project=$PROJECT" "--zone=$ZONE")
if ((chips > host)); then
  echo "# $chips chips on several hosts: --config.training.batch_size must be a multiple of $chips"
fi
run gcloud compute tpus tpu-vm create "$NAME" "${location[@]}" \
  "--accelerator-type=$ACCELERATOR_TYPE" "--version=$RUNTIME_VERSION"

# --worker=all: every host of a slice runs the same commands; JAX finds the other hosts.
on_hosts=(gcloud compute tpus tpu-vm ssh "$NAME" "${location[@]}" --worker=all)
run "${on_hosts[@]}" --command="sudo apt-get update && sudo apt-get install -y git python3.11-venv"
run "${on_hosts[@]}" --command="git clone ${REPOSITORY@Q} attn && cd attn && python3.11 -m venv .venv && .venv/bin/pip install -e .[tpu]"
if [[ $check == true ]]; then
  right=true results=check-$ACCELERATOR_TYPE.json
  run "${on_hosts[@]}" --command="cd attn && .venv/bin/attn check --output check.json" || right=false
  run gcloud compute tpus tpu-vm scp "$NAME:attn/check.json" "$results" "${location[@]}"
  if [[ $right == false ]]; then fail "attn check has found a wrong result: see $results; $NAME is still there"; fi
fi
run "${on_hosts[@]}" --command="cd attn && .venv/bin/python train.py --distributed=auto $TRAIN_ARGS"

echo "# when done: gcloud compute tpus tpu-vm delete $NAME ${location[*]}"
