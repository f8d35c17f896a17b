#!/usr/bin/env bash
# install.sh PYTHON: a venv for each framework that the bench compares with, below .venv-peers.
# One that cannot be had here does not stop the others; the bench's table says what is missing.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit
python=${1:-python3}
peers=scripts/peers

make_venv() { # make_venv NAME REQUIREMENTS: the venv with what the file lists
  local venv=.venv-peers/$1
  [[ -e $venv/.installed ]] && return 0
  "$python" -m venv "$venv" &&
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$2" &&
    touch "$venv/.installed"
}

make_venv torch $peers/requirements-torch.txt || echo "no torch here"
make_venv tensorflow $peers/requirements-tensorflow.txt || echo "no tensorflow here"

# Horovod has no wheels: it is compiled against torch, for a quarter of an hour.
make_horovod() {
  local venv=.venv-peers/horovod pip
  [[ -e $venv/.installed ]] && return 0
  pip=("$venv/bin/python" -m pip install --disable-pip-version-check)
  "$python" -m venv "$venv" && "${pip[@]}" --quiet -r $peers/requirements-horovod.txt &&
    env PATH="$PWD/$venv/bin:$PATH" CXX="$PWD/$peers/cxx17.sh" HOROVOD_WITH_PYTORCH=1 \
      HOROVOD_WITH_GLOO=1 HOROVOD_WITHOUT_MPI=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1 \
      "${pip[@]}" --no-build-isolation horovod==0.28.1 >"$venv/build.log" 2>&1 &&
    touch "$venv/.installed"
}

make_horovod || echo "no horovod here: .venv-peers/horovod/build.log"
