"""LoRA patches of a MODEL, for processes that have its weights but not its LoRAs: tensors in a safetensors file."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from comfy.weight_adapter import WeightAdapterBase, adapters
from safetensors.torch import load_file, save_file
from torch import Tensor

KEPT_FILES = 2  # on each machine, of those used last
Encoded = dict[str, list[list[Any]]]  # patches in JSON, with the numbers of their tensors
ADAPTERS = {adapter.__name__: adapter for adapter in adapters}
REFUSED = (
    "Helios Multi-GPU cannot take {what} to its cards. Take out the node that put it on the model, or Helios Multi-GPU."
)


def check_patches(patches: Mapping[str, Any]) -> None:
    """Raise ValueError for what is no LoRA."""
    for key, entries in patches.items():
        for _, value, _, _, function in entries:
            if isinstance(value, list):
                raise ValueError(REFUSED.format(what=f"a merged model's weights ({key})"))
            if function is not None:
                raise ValueError(REFUSED.format(what=f"a patch with code of its own ({key})"))
            _encoded(value, {})


def write_patches(folder: Path, patches: Mapping[str, Any]) -> tuple[Path | None, Encoded]:
    """The file with the tensors, named by what is in it, and the rest. Another strength is the same file."""
    tensors: dict[str, Tensor] = {}
    encoded = {
        key: [
            [strength, _encoded(value, tensors), of_model, offset] for strength, value, of_model, offset, _ in entries
        ]
        for key, entries in patches.items()
    }
    if not tensors:
        return None, encoded
    whole = {name: x.cpu().clone(memory_format=torch.contiguous_format) for name, x in tensors.items()}
    content = hashlib.sha256()
    for name, x in whole.items():
        content.update(f"{name} {x.dtype} {tuple(x.shape)}\n".encode())
        content.update(x.reshape(-1).view(torch.uint8).numpy().data)
    file = folder / f"{content.hexdigest()}.safetensors"
    if not file.exists():
        save_file(whole, file)
    return file, encoded


def read_patches(file: Path | None, encoded: Encoded) -> dict[str, Any]:
    """As a host's patcher has them. The tensors stay in the file until they are used."""
    tensors: dict[str, Tensor] = {} if file is None else load_file(file)
    return {
        key: [
            (strength, _decoded(value, tensors), of_model, None if offset is None else tuple(offset), None)
            for strength, value, of_model, offset in entries
        ]
        for key, entries in encoded.items()
    }


def keep_files(folder: Path, kept: Collection[str]) -> None:
    """Remove the other files of patches. Several workers of a machine do so at a time."""
    for file in folder.glob("*.safetensors"):
        if file.name not in kept:
            file.unlink(missing_ok=True)


def _encoded(value: Any, tensors: dict[str, Tensor]) -> Any:
    """In JSON, with the numbers of the tensors in it. Raises ValueError for what this cannot say."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        tensors[name := str(len(tensors))] = value
        return {"tensor": name}
    if isinstance(value, (tuple, list)):
        return [_encoded(each, tensors) for each in value]
    kind = type(value).__name__
    if isinstance(value, WeightAdapterBase) and ADAPTERS.get(kind) is type(value):
        return {"adapter": kind, "weights": _encoded(value.weights, tensors)}
    raise ValueError(REFUSED.format(what=f"a patch of another kind ({kind})"))


def _decoded(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return tuple(_decoded(each, tensors) for each in value)
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    return ADAPTERS[value["adapter"]](set(), _decoded(value["weights"], tensors))
