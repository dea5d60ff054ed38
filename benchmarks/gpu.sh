#!/usr/bin/env bash
# Check attention on an NVIDIA GPU and time it beside cuDNN and torch's FlexAttention, in at most eight minutes.
#
#   benchmarks/gpu.sh                                run everything, and write benchmarks/results/gpu.json
#   benchmarks/gpu.sh --small --output small.json    run the same steps at small sizes, without a GPU
#   benchmarks/gpu.sh --install                      make .venv-gpu with JAX for CUDA and torch, and end
#   benchmarks/gpu.sh --help                         show all options
#
# Variables: PYTHON       the Python to run or install with (default: of .venv-gpu, of .venv, or python3)
#            CUDA=13      for --install: 12 or 13; 13 needs a driver from 580 on
#
# Nothing is downloaded without --install. It needs JAX for CUDA, NumPy, Flax, jaxtyping, rich and psutil; without torch
# its contestants are left out. The results are saved as they come, so an early end loses nothing.
set -euo pipefail

usage() { sed -n '2,14s/^# \{0,1\}//p' "$0"; }

root=$(cd "$(dirname "$0")/.." && pwd)
CUDA=${CUDA:-13}
install=("${PYTHON:-python3} -m venv .venv-gpu" ".venv-gpu/bin/python -m pip install -e '.[cuda$CUDA,bench]'")

for argument in "$@"; do
  if [[ $argument == --install ]]; then
    if [[ $# -gt 1 || ($CUDA != 12 && $CUDA != 13) ]]; then
      echo "error: --install takes no other option, and CUDA=12 or CUDA=13 (got '$*', CUDA=$CUDA)" >&2
      exit 2
    fi
    cd "$root"
    for command in "${install[@]}"; do
      echo "$command"
      eval "$command"
    done
    exit
  fi
done

if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python3
  for folder in .venv-gpu .venv; do
    if [[ -x $root/$folder/bin/python ]]; then PYTHON=$root/$folder/bin/python && break; fi
  done
fi
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

# One process finds out what is missing, before the script itself fails at its first import.
missing=$("$PYTHON" -c '
import importlib.util, sys
if sys.version_info < (3, 11):
    print("Python 3.11")
print(*(name for name in sys.argv[1:] if importlib.util.find_spec(name) is None))
' jax jaxlib numpy flax jaxtyping rich psutil) || { echo "error: PYTHON=$PYTHON does not run" >&2; exit 2; }
if [[ -n ${missing//[[:space:]]/} ]]; then
  { echo "error: $PYTHON lacks: $missing"; echo "benchmarks/gpu.sh --install runs:"; printf '  %s\n' "${install[@]}"; } >&2
  exit 2
fi

for argument in "$@"; do
  if [[ $argument == -h || $argument == --help ]]; then usage && echo; fi
done
exec "$PYTHON" "$root/benchmarks/gpu.py" "$@"
