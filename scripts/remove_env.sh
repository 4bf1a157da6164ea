#!/usr/bin/env bash
# Remove a virtual environment that setup_env.sh has made, and no other folder: remove_env.sh VENV
set -euo pipefail
venv=$1

if [ -f "$venv/.made_by_setup" ] && [ -f "$venv/pyvenv.cfg" ]; then
  rm -rf -- "$venv"
elif [ -e "$venv" ]; then
  echo "'$venv' stays: make setup has not made it. Remove it yourself if nothing else uses it."
fi
