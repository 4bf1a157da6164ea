"""Everything that needs a GPU, in one command: `make gpu`.

The 14B network has random weights: with fused kernels and without, profiled, compiled, decoded, offloaded, shared out.
Beside that there are the tests of tests/gpu, and the nodes on the ComfyUI of COMFYUI_PATH. Each is a part with a time
limit, a file and a log in build/gpu, what is worth most first, and a further run goes on with what is not finished. It
needs PyTorch, and the NumPy that usually comes with it; parts that need more are listed where it is missing. --tiny
rehearses all of it on toy sizes, on any machine: its numbers say nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

if importlib.util.find_spec("torch") is None:
    sys.exit(f"{sys.executable} has no PyTorch. Name a Python that has it: make gpu PYTHON_GPU=<python>")

import card_tests
import cards_gpu
import comfyui_gpu
import comfyui_server
import decode
import memory_gpu
import network_gpu
import quantised_gpu
import torch
from card import REAL, TINY
from measure import ROOT, Row, digest, machine
from parts import MISSING, MissingError, Part, add_row, run, summarise

SECONDS = {  # that each part is expected to take on an H200, what is worth most first
    "tests_fused": 35,
    "tests_parity": 25,
    "network": 120,
    "decoding": 120,
    "compiled": 120,
    "offload_block_host": 90,  # with writing the weights
    "offload_leaf_host": 50,
    "tests_offload": 20,
    "tests_compiled": 60,
    "offload_resident": 50,
    "offload_block_disk": 100,
    "offload_leaf_disk": 100,
    "quantised": 60,
    "cards": 150,
    "comfyui_first_run": 60,
    "comfyui_14b": 150,  # with writing the weights, where no part before has
    "comfyui_lowvram": 90,
    "comfyui_block": 60,
    "comfyui_patched": 150,
    "comfyui_dynamic_vram": 90,
    "comfyui_leaf": 70,
}
INTERPRETED = ("tests_fused", "network")  # whose kernels a rehearsal runs in Triton's interpreter
IN_COMFYUI = "comfyui_"  # how the names begin of those in a ComfyUI
REHEARSAL_SECONDS = 300  # of a part, on a busy machine
SCRATCH = "scratch"  # in the folder of the results, while a run lasts: models, the 14B's weights of 29 GB in them


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="rehearse on toy sizes, also without a GPU")
    parser.add_argument("--only", nargs="+", metavar="PART", help=f"these, or all that begin so: {', '.join(SECONDS)}")
    parser.add_argument("--seconds", type=float, default=math.inf, help="leave out what takes longer than this in all")
    parser.add_argument("--fresh", action="store_true", help="run finished parts again")
    parser.add_argument("--summary", action="store_true", help="run nothing: the summary of the parts that are there")
    parser.add_argument("--folder", type=Path, help="for the results, instead of build/gpu or build/gpu-tiny")
    parser.add_argument("--part", choices=SECONDS, help=argparse.SUPPRESS)  # this one, in this process
    options = parser.parse_args()
    folder = options.folder or ROOT / "build" / ("gpu-tiny" if options.tiny else "gpu")
    if options.part:
        return run_part(options.part, folder, options.tiny)
    if not (options.tiny or options.summary or torch.cuda.is_available()):
        parser.error("there is no GPU here that PyTorch can use. TINY=1 (--tiny) rehearses on toy sizes on the CPU.")
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # which Triton reads when a part imports it, and the core again

    command = [sys.executable, __file__, *(["--tiny"] if options.tiny else []), "--folder", str(folder), "--part"]
    parts = [
        Part(name, REHEARSAL_SECONDS if options.tiny else seconds, [*command, name], about_part(name))
        for name, seconds in SECONDS.items()
    ]
    good = True
    if not options.summary:
        chosen = [part.name for part in parts if part.name.startswith(tuple(options.only or [""]))]
        about = {"network": "toys: the numbers say nothing" if options.tiny else "14B, bf16", "machine": machine()}
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what was begun is ended
        try:
            good = run(parts, folder, about, chosen=chosen, seconds=options.seconds, fresh=options.fresh)
        finally:
            shutil.rmtree(folder / SCRATCH, ignore_errors=True)
    print(f"\n{summarise(parts, folder)}\n{folder}/summary.md, summary.json")
    return 0 if good else 1


def about_part(name: str) -> dict[str, str | None]:
    """What its rows are of, beside the machine and the code of all parts."""
    if not name.startswith(IN_COMFYUI):
        return {}
    return {"comfyui": comfyui_server.version(), "pack": digest("host", "nodes")}


def run_part(name: str, folder: Path, tiny: bool) -> int:
    """In this process, which runs nothing else; returns its exit status."""

    def emit(row: Row) -> None:
        print(row, flush=True)
        add_row(folder / f"{name}.json", row)

    if name not in INTERPRETED:
        os.environ.pop("TRITON_INTERPRET", None)
    try:
        if name.startswith("tests_"):
            card_tests.run(name.removeprefix("tests_"), emit)
            return 0
        with torch.inference_mode():
            for row in rows(name, folder, tiny):
                emit(row)
    except (MissingError, card_tests.FailedTests) as error:
        print(error)
        return MISSING if isinstance(error, MissingError) else 1
    return 0


def rows(name: str, folder: Path, tiny: bool) -> Iterator[Row]:
    shape = TINY if tiny else REAL
    if name == "network":
        return network_gpu.rows(shape, folder)
    if name == "decoding":
        return decode.closer(shape, folder / "profile-decode.txt")
    if name == "compiled":
        return network_gpu.compiled(shape)
    if name == "quantised":
        return quantised_gpu.rows(shape)
    if name == "cards":
        return cards_gpu.rows(shape)
    scratch = folder / SCRATCH
    models = scratch / "models"
    if name.startswith(IN_COMFYUI):
        return comfyui_gpu.rows(name.removeprefix(IN_COMFYUI), models, scratch / name, tiny)
    return memory_gpu.rows(name.removeprefix("offload_"), models / comfyui_server.WEIGHTS, tiny)


if __name__ == "__main__":
    sys.exit(main())
