#!/usr/bin/env bash
# A TPU slice on Google Cloud: make it, run on all of its workers, and make it again when a
# preemptible one is taken away.
#
#   NAME=my-slice ZONE=us-east5-b TYPE=v5litepod-16 scripts/tpu_vm.sh \
#     --config=configs/llama2_7b.py --workdir=/mnt/runs/7b
#
# What follows is what `spmd-train train` takes. --workdir must be reached by every worker, and outlive
# them: mount a disk, or a bucket by gcsfuse, with START, a command that each runs first.
# Needs gcloud, logged in, and a project with TPU quota. Delete the slice when you are done:
#   gcloud compute tpus tpu-vm delete "$NAME" --zone="$ZONE"
set -uo pipefail

: "${NAME:?set NAME to what the slice is to be called}"
: "${ZONE:?set ZONE, as in us-east5-b}"
: "${TYPE:?set TYPE to the accelerator type, as in v5litepod-16}"
version=${VERSION:-v2-alpha-tpuv5-lite}
package=${PACKAGE:-spmd-train[tpu]}
spot=${SPOT:-1}
start=${START:-}

create() {
  local flags=("--zone=${ZONE}" "--accelerator-type=${TYPE}" "--version=${version}")
  if [[ ${spot} == 1 ]]; then
    flags+=(--spot)
  fi
  gcloud compute tpus tpu-vm create "${NAME}" "${flags[@]}" || return
  on_all "pip install --quiet '${package}' -f https://storage.googleapis.com/jax-releases/libtpu_releases.html"
}

on_all() {
  gcloud compute tpus tpu-vm ssh "${NAME}" "--zone=${ZONE}" --worker=all --command="$1"
}

state() {
  gcloud compute tpus tpu-vm describe "${NAME}" "--zone=${ZONE}" --format='value(state)' 2>/dev/null
}

# Quoted once more: the words go through a shell on the worker.
command="${start:+${start} && }spmd-train train$(printf ' %q' "$@")"
failures=0
while true; do
  case $(state) in
    READY) ;;
    PREEMPTED | TERMINATED | STOPPED)
      gcloud compute tpus tpu-vm delete "${NAME}" "--zone=${ZONE}" --quiet
      create || { sleep 60; continue; } ;;
    "") create || { sleep 60; continue; } ;;
    *) sleep 30; continue ;;
  esac

  # Every worker finds the others by JAX's own look at the pod; SIGTERM before a preemption makes
  # them save.
  on_all "${command}"
  code=$?
  [[ ${code} -eq 0 ]] && exit 0
  [[ ${code} -eq 2 ]] && exit 2
  if [[ $(state) == READY && ${code} -ne 75 ]]; then
    failures=$((failures + 1))
    if [[ ${failures} -ge ${MAX_FAILURES:-5} ]]; then
      echo "failed ${failures} times on a slice that is there; see above" >&2
      exit "${code}"
    fi
  fi
  sleep 10
done
