"""The checkout as the package `comfyui_helios`, loaded by path as ComfyUI does; and a ComfyUI in this process."""

from __future__ import annotations

import ctypes
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from harness.host import ROOT, comfyui_path

PACK = "comfyui_helios"
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def load_pack() -> None:
    """From here on `comfyui_helios` can be imported, and `helios_core` is a part of it."""
    spec = importlib.util.spec_from_file_location(PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec and spec.loader
    sys.modules[PACK] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.meta_path.insert(0, OneCore())


def load_comfyui(base: str | Path) -> None:
    """Put ComfyUI on sys.path, in CPU mode, with this folder for all that it writes.

    Before the first import of its other modules, which read the settings. Its own main.py alone takes a command line.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.path.insert(0, str(comfyui_path()))
    from comfy.cli_args import args

    args.cpu = True
    args.use_pytorch_cross_attention = True
    args.base_directory = str(base)
    args.database_url = "sqlite:///:memory:"


def load_training() -> None:
    """What draws Helios-Tiny's world and sees what a video shows: `world` and `detect` of training/.

    Behind all else on sys.path, for its files have short names.
    """
    sys.path.append(str(ROOT / "training"))


def keep_memory() -> None:
    """Let glibc keep what is freed: a third of a VAE's time on the CPU goes into asking for the same memory again."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


class OneCore(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Answers `import helios_core[.x]`, as scripts write it, with `comfyui_helios.helios_core[.x]`.

    A second copy would have classes of its own, and `isinstance` between the two fails.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] != "helios_core":
            return None
        return importlib.machinery.ModuleSpec(fullname, self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = importlib.import_module(f"{PACK}.{spec.name}")
        self.own_spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.own_spec  # the import system has just put the alias's there
