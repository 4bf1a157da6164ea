"""A worker process begins here: run by its path, with nothing on its command line.

It imports ComfyUI as the server does, but not its main.py, and the pack as a package without nodes. What it is to do
comes through its standard input, and answers leave through its standard output, which nothing else may write to.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from types import ModuleType

PACK = "helios_worker"


def main() -> None:
    # Not by sys.stdin: Python cannot end while a thread waits for that.
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print goes to the log
    settings = json.loads(requests.readline())
    sys.path[0] = settings["comfyui"]  # in place of this file's folder
    command_line = importlib.import_module("comfy.cli_args")
    vars(command_line.args).update(settings["arguments"])
    command_line.args.fast = {command_line.PerformanceFeature(feature) for feature in command_line.args.fast}
    pack = ModuleType(PACK)
    pack.__path__ = [str(Path(__file__).resolve().parents[2])]
    sys.modules[PACK] = pack
    importlib.import_module(f"{PACK}.host.cluster.version").check_version(settings["version"])
    worker = importlib.import_module(f"{PACK}.host.cluster.worker")
    worker.serve(settings["job"], requests, answers)


if __name__ == "__main__":
    main()
