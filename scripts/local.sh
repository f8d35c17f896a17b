#!/usr/bin/env bash
# Several processes on this machine, supervised: one for each GPU, or simulated devices on a CPU.
#
#   scripts/local.sh 2 --config=configs/lm_tiny.py --workdir=runs/tiny      # two GPUs
#   SIMULATE_DEVICES=2 scripts/local.sh 2 --workdir=runs/tiny               # 2 processes x 2 devices
#
# The first word is the number of processes, the rest is what `spmd-train train` takes.
# Exit codes: 0 done; 75 told to stop (SIGTERM) and saved: the same line goes on.
set -euo pipefail

if [[ $# -lt 1 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: $0 NUM_PROCESSES [what spmd-train train takes]" >&2
  exit 2
fi
num_processes=$1
shift

flags=("--num_processes=${num_processes}" "--max_restarts=${MAX_RESTARTS:-3}")
if [[ -n ${SIMULATE_DEVICES:-} ]]; then
  flags+=("--simulate_devices=${SIMULATE_DEVICES}")
fi
exec spmd-train launch "${flags[@]}" -- train "$@"
