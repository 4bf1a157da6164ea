#!/usr/bin/env bash
# Make a virtual environment and install the tests' requirements: setup_env.sh PYTHON VENV REQUIREMENTS
set -euo pipefail
python=$1 venv=$2 requirements=$3

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

if ! [ -x "$venv/bin/python" ]; then
  if ! new_enough "$python"; then
    for other in python3.12 python3.11 python3.13; do
      if new_enough "$other"; then python=$other && break; fi
    done
  fi
  if ! new_enough "$python"; then
    echo "Tests and demo need Python 3.11 or newer (diffusers 0.42, which we are compared with, asks for it); " \
      "'$python' is not. Run make with PYTHON=<a newer one>." >&2
    exit 1
  fi
  "$python" -m venv "$venv"
  touch "$venv/.made_by_setup"  # without it, remove_env.sh leaves an environment alone
fi
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$requirements"
