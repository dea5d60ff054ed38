#!/usr/bin/env bash
# Create a Cloud TPU VM (or a slice of a pod), install the project on each of its hosts, and train.
#
#   PROJECT=my-project ZONE=us-central1-a launch/tpu_vm.sh --dry_run     print the commands
#   PROJECT=my-project ZONE=us-central1-a launch/tpu_vm.sh               run them
#
# Variables: PROJECT, ZONE                       required
#            NAME=attn                           name of the TPU VM
#            ACCELERATOR_TYPE=v5litepod-8        one host; v5litepod-16 and larger are slices of several hosts
#            RUNTIME_VERSION=v2-alpha-tpuv5-lite
#            REPOSITORY                          a git URL that the hosts can clone (default: origin of this repository)
#            TRAIN_ARGS="--config=configs/reverse.py"
set -euo pipefail

usage() { sed -n '2,13s/^# \{0,1\}//p' "$0"; }

dry_run=false
for argument in "$@"; do
  case "$argument" in
    --dry_run) dry_run=true ;;
    -h | --help) usage; exit 0 ;;
    *) echo "error: unknown argument '$argument'; known: --dry_run, --help" >&2; exit 2 ;;
  esac
done

origin=$(git -C "$(dirname "$0")" config --get remote.origin.url || true)
NAME=${NAME:-attn}
ACCELERATOR_TYPE=${ACCELERATOR_TYPE:-v5litepod-8}
RUNTIME_VERSION=${RUNTIME_VERSION:-v2-alpha-tpuv5-lite}
REPOSITORY=${REPOSITORY:-$origin}
TRAIN_ARGS=${TRAIN_ARGS:---config=configs/reverse.py}
for variable in PROJECT ZONE REPOSITORY; do
  if [[ -z "${!variable:-}" ]]; then
    echo "error: $variable is not set; see launch/tpu_vm.sh --help" >&2
    exit 2
  fi
done

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
run gcloud compute tpus tpu-vm create "$NAME" "${location[@]}" \
  "--accelerator-type=$ACCELERATOR_TYPE" "--version=$RUNTIME_VERSION"

# --worker=all: every host of a slice runs the same commands; JAX finds the other hosts.
on_hosts=(gcloud compute tpus tpu-vm ssh "$NAME" "${location[@]}" --worker=all)
run "${on_hosts[@]}" --command="sudo apt-get update && sudo apt-get install -y git python3.11-venv"
run "${on_hosts[@]}" --command="git clone ${REPOSITORY@Q} attn && cd attn && python3.11 -m venv .venv && .venv/bin/pip install -e .[tpu]"
run "${on_hosts[@]}" --command="cd attn && .venv/bin/python train.py --distributed=auto $TRAIN_ARGS"

echo "# when done: gcloud compute tpus tpu-vm delete $NAME ${location[*]}"
