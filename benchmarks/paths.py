"""Imported first: puts the checkout on sys.path, and scripts/ for what benchmarks share with the tests.

Python itself puts only the folder of the script that runs there.
"""

import os
import sys

from measure import ROOT

sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]


def add_comfyui() -> None:
    """Ahead of the checkout, whose nodes/ would hide ComfyUI's nodes.py."""
    sys.path.insert(0, str(ROOT / os.environ.get("COMFYUI_PATH", "build/comfyui")))
