#!/usr/bin/env bash
# Writes .ci/constraints-py311.txt and -py312.txt: the versions that `make` and CI install.
# Python 3.11 is the last that jax 0.10 supports; 3.12 and later share the newer set.
set -euo pipefail
cd "$(dirname "$0")/.."

lock() { # lock PYTHON FILE EXTRAS
  local venv
  venv=$(mktemp -d)
  "$1" -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --upgrade pip
  "$venv/bin/python" -m pip install --quiet ".[$3]"
  "$venv/bin/python" -m pip freeze --exclude spmd-train >"$2"
  rm -rf "$venv"
}

PYTHON_OLD=${PYTHON_OLD:-python3.11}
PYTHON_NEW=${PYTHON_NEW:-python3.13}
lock "$PYTHON_OLD" .ci/constraints-py311.txt test,lint
lock "$PYTHON_NEW" .ci/constraints-py312.txt test,lint
# The other side of the parity proofs runs on the older Python only.
printf 'torch==2.13.0\ntransformers==5.23.0\n' >>.ci/constraints-py311.txt
