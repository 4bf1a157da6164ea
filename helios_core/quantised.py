"""Quantised weights in files: ComfyUI's formats, and the three ways in which a file says which layer has which.

Whatever it says it with, one `QuantisedLayer` comes out for each layer. Nothing is decoded here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .json_file import parse_json
from .quoting import quoted, some
from .regular_file import CheckpointError
from .safetensors_file import StoredTensor, read_tensors

METADATA_KEY = "_quantization_metadata"  # of a file: JSON, formats by layer
MARK = "comfy_quant"  # beside a layer's weight: the same as bytes, a layer at a time
LEGACY_MARK = "scaled_fp8"  # one for a whole file of the oldest kind, whose layers have a `scale_weight`
LEGACY_PARTS = {"scale_weight": "weight_scale", "scale_input": "input_scale"}
FULL_PRECISION = "full_precision_matrix_mult"  # setting: the host must not multiply in the format
ROTATES, ROTATED_TOGETHER = "convrot", "convrot_groupsize"  # settings: whether columns were rotated, how many at once
SCALED_TOGETHER = "group_size"  # setting of asym_w4a8_int8: how many columns have a scale in common
TOGETHER = {ROTATED_TOGETHER: (4, 16, 64, 256, 1024), SCALED_TOGETHER: (4, 8, 16, 32, 64, 128)}  # that hosts can
USUAL = {ROTATED_TOGETHER: 256, SCALED_TOGETHER: 16}  # as ComfyUI takes it where a file does not say
LARGEST_TEXT = 4096  # bytes

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """A tensor that a quantised layer has in a file: the types and shapes it may have."""

    dtypes: tuple[torch.dtype, ...]
    shapes: tuple[Shape, ...]  # of them, as of the types, the first is usual
    optional: bool = False
    is_scale: bool = True  # if of floats: no value is below 0

    @property
    def is_number(self) -> bool:
        return () in self.shapes


FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NUMBER: tuple[Shape, ...] = ((), (1,), (1, 1))


def _float8(dtype: torch.dtype) -> Callable[[int, int], dict[str, Part]]:
    def parts(rows: int, columns: int) -> dict[str, Part]:
        return {
            "weight": Part((dtype,), ((rows, columns),)),
            "weight_scale": Part(FLOATS, NUMBER),
            "input_scale": Part(FLOATS, NUMBER, optional=True),
        }

    return parts


def _mxfp8(rows: int, columns: int) -> dict[str, Part]:
    rows, columns = _up(rows, 32), _up(columns, 32)
    return {
        "weight": Part((torch.float8_e4m3fn,), ((rows, columns),)),
        "weight_scale": Part((torch.uint8,), ((_up(rows, 128), _up(columns // 32, 4)),)),
        "input_scale": Part(FLOATS, NUMBER, optional=True),
    }


def _nvfp4(rows: int, columns: int) -> dict[str, Part]:
    padded_rows, padded_columns = _up(rows, 16), _up(columns, 16)
    scales = (_up(padded_rows, 128), _up(padded_columns // 16, 4))
    return {
        "weight": Part((torch.uint8,), ((padded_rows, padded_columns // 2),)),  # two values a byte
        "weight_scale": Part((torch.float8_e4m3fn, torch.uint8), (scales,)),
        "weight_scale_2": Part(FLOATS, NUMBER),
        "input_scale": Part(FLOATS, NUMBER, optional=True),
        "pre_quant_scale": Part(FLOATS, ((columns,),), optional=True),
    }


def _int8(rows: int, columns: int) -> dict[str, Part]:
    return {
        "weight": Part((torch.int8,), ((rows, columns),)),
        "weight_scale": Part(FLOATS, ((rows, 1), (rows,), *NUMBER)),
    }


def _w4a4(rows: int, columns: int) -> dict[str, Part]:
    return {
        "weight": Part((torch.int8,), ((rows, columns // 2),)),  # two values a byte
        "weight_scale": Part(FLOATS, ((rows,), (rows, 1))),
    }


def _w4a8(rows: int, columns: int, together: int = USUAL[SCALED_TOGETHER]) -> dict[str, Part]:
    scales = (torch.float8_e4m3fn, torch.uint8, torch.float32)
    return {
        "weight": Part((torch.int8,), ((rows, columns // 2),)),
        "weight_s_rel": Part(scales, ((rows, columns // together),)),
        "weight_s_channel": Part((torch.float32,), ((rows,),)),
        "weight_codebook": Part((torch.float32,), ((16,),), optional=True, is_scale=False),
    }


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


FORMATS: dict[str, Callable[..., dict[str, Part]]] = {  # of rows and columns
    "float8_e4m3fn": _float8(torch.float8_e4m3fn),
    "float8_e5m2": _float8(torch.float8_e5m2),
    "mxfp8": _mxfp8,
    "nvfp4": _nvfp4,
    "int8_tensorwise": _int8,
    "convrot_w4a4": _w4a4,
    "asym_w4a8_int8": _w4a8,
}
TREATED_TOGETHER = {  # settings that say how many columns are, of formats in which some always are
    "convrot_w4a4": (ROTATED_TOGETHER,),
    "asym_w4a8_int8": (ROTATED_TOGETHER, SCALED_TOGETHER),
}
ONE_SCALE = {  # formats whose values are the weight's, but for one factor
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}
PART_NAMES = {name for parts in FORMATS.values() for name in parts(1, 1)} - {"weight"}


@dataclass(frozen=True)
class QuantisedLayer:
    """How a file holds the matrix of one layer."""

    format: str  # one of FORMATS
    settings: Mapping[str, Any]  # as the file has them, the format among them
    parts: Mapping[str, StoredTensor]  # what lies beside the weight

    @property
    def together(self) -> dict[str, Any]:
        """By setting: how many columns were treated as one, as the file says or as ComfyUI takes it to mean."""
        more = self.settings.get("params")
        told = {**(more if isinstance(more, dict) else {}), **self.settings}
        names = TREATED_TOGETHER.get(self.format, (ROTATED_TOGETHER,) if told.get(ROTATES) else ())
        return {name: told.get(name, USUAL[name]) for name in names}

    def kinds(self, rows: int, columns: int) -> dict[str, Part]:
        """What the format has a matrix of this size made of."""
        together = self.together
        more = [together[SCALED_TOGETHER]] if SCALED_TOGETHER in together else []
        return FORMATS[self.format](rows, columns, *more)


def split_quantised(
    path: Path, metadata: Mapping[str, str], tensors: Mapping[str, StoredTensor], own_layer: Callable[[str], str]
) -> tuple[dict[str, StoredTensor], dict[str, QuantisedLayer]]:
    """Part a file's tensors into those of the network and, by layer, what quantised ones have beside their weights.

    own_layer: the network's name for a layer that a file calls so. Raises CheckpointError for an unknown format, and
    for scales of no layer.
    """
    rest = dict(tensors)
    settings = _legacy_settings(rest)
    if METADATA_KEY in metadata:
        told = {own_layer(layer): x for layer, x in _metadata_settings(path, metadata[METADATA_KEY]).items()}
        # A file may hold text encoders as well.
        settings |= {layer: values for layer, values in told.items() if f"{layer}.weight" in rest}
    for mark in [name for name in rest if name.endswith(f".{MARK}")]:
        settings[mark.removesuffix(f".{MARK}")] = read_text(path, rest.pop(mark))
    layers = {}
    for layer, values in settings.items():
        if not isinstance(name := values.get("format"), str) or name not in FORMATS:
            raise CheckpointError(
                f"{path} has {layer} in the quantised format {quoted(name)}, which is none of "
                f"{some(FORMATS)}. Use bf16 weights, or make scaled fp8 ones with scripts/convert_checkpoint.py."
            )
        parts = {part: rest.pop(f"{layer}.{part}") for part in sorted(PART_NAMES) if f"{layer}.{part}" in rest}
        layers[layer] = QuantisedLayer(name, values, parts)
    if left := [tensor.key for name, tensor in rest.items() if name.rpartition(".")[2] in PART_NAMES]:
        raise CheckpointError(
            f"{path} has scales ({some(left)}) of layers that it does not say are quantised, neither by {METADATA_KEY} "
            f"nor by {MARK}: whatever wrote it has lost that. Take the file that it was made from."
        )
    return rest, layers


def misfits(layer: QuantisedLayer, weight: StoredTensor, shape: Shape) -> Iterator[str]:
    """What of a quantised layer's tensors is not there, or not as its format has it for a matrix of this shape."""
    wrong = [
        f"{weight.key} has {name} {quoted(size)} for {shape[1]} columns"
        for name, size in layer.together.items()
        if type(size) is not int or size not in TOGETHER[name] or shape[1] % size
    ]
    if wrong:
        yield from wrong
        return
    expected = layer.kinds(*shape)
    found = {"weight": weight, **layer.parts}
    for name, part in expected.items():
        if name not in found:
            if not part.optional:
                yield f"{weight.key} has no {name}"
        elif (tensor := found[name]).shape not in part.shapes or tensor.dtype not in part.dtypes:
            yield (
                f"{tensor.key} {tensor.shape} of {_said(tensor.dtype)} for {part.shapes[0]} of "
                f"{' or '.join(map(_said, part.dtypes))}"
            )
    yield from (tensor.key for name, tensor in layer.parts.items() if name not in expected)


def read_parts(layer: QuantisedLayer) -> dict[str, Tensor]:
    """What lies beside a quantised layer's weight, numbers as float32 (). CheckpointError where no value can be."""

    def target(name: str) -> torch.dtype:
        stored = layer.parts[name].dtype
        return torch.float32 if stored in FLOATS else stored

    kinds = FORMATS[layer.format](1, 1)
    parts = {}
    for name, values in read_tensors(layer.parts, target):
        least = 0.0 if kinds[name].is_scale else -math.inf
        if values.dtype == torch.float32 and not (values.isfinite() & (values >= least)).all():
            stored = layer.parts[name]
            raise CheckpointError(
                f"{stored.file} is damaged: {quoted(stored.key)} has values that are no scale, as NaN or numbers below "
                "0. Download the file again, or convert it again."
            )
        parts[name] = values.reshape(()).clone() if kinds[name].is_number and values.numel() == 1 else values.clone()
    return parts


def _legacy_settings(tensors: dict[str, StoredTensor]) -> dict[str, dict[str, Any]]:
    """The layers of a file of the oldest kind, whose parts get the names they have in newer ones."""
    mark = tensors.pop(LEGACY_MARK, None)
    layers = set()
    for name in list(tensors):
        layer, _, part = name.rpartition(".")
        if part in LEGACY_PARTS:
            layers.add(layer)
            stored = tensors.pop(name)
            if part == "scale_weight" or not _is_one(stored):  # 1 is what such files say for: not measured
                tensors[f"{layer}.{LEGACY_PARTS[part]}"] = stored
        elif mark is not None and part == "weight" and tensors[name].dtype in ONE_SCALE.values():
            layers.add(layer)  # with or without a scale: there ought to be one
    e5m2 = {layer for layer in layers if (x := tensors.get(f"{layer}.weight")) and x.dtype == torch.float8_e5m2}
    full = {FULL_PRECISION: True} if mark is not None and mark.shape == (2,) else {}
    return {layer: {"format": "float8_e5m2" if layer in e5m2 else "float8_e4m3fn", **full} for layer in sorted(layers)}


def _is_one(stored: StoredTensor) -> bool:
    return stored.dtype in FLOATS and stored.shape in NUMBER and float(_read(stored)) == 1


def _metadata_settings(path: Path, text: str) -> dict[str, dict[str, Any]]:
    try:
        layers = parse_json(text.encode()).get("layers")
        if not isinstance(layers, dict) or not all(isinstance(values, dict) for values in layers.values()):
            raise ValueError("it has no settings by layer")
    except ValueError as error:
        raise CheckpointError(
            f"The metadata {METADATA_KEY!r} of {path} is damaged ({error}). Download the file again."
        ) from error
    return layers


def read_text(path: Path, stored: StoredTensor) -> dict[str, Any]:
    """The JSON object whose text this tensor of the file holds, byte by byte."""
    if stored.dtype != torch.uint8 or len(stored.shape) != 1 or stored.shape[0] > LARGEST_TEXT:
        raise CheckpointError(
            f"{path} has {quoted(stored.key)} of {_said(stored.dtype)} in the shape {stored.shape}, which is no "
            "text of settings. Download the file again."
        )
    try:
        return parse_json(bytes(_read(stored).tolist()))
    except ValueError as error:
        raise CheckpointError(f"{quoted(stored.key)} of {path} is damaged ({error}). Download it again.") from error


def _read(stored: StoredTensor) -> Tensor:
    [(_, tensor)] = read_tensors({stored.key: stored})
    return tensor


def _said(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def metadata_text(settings: Mapping[str, Mapping[str, Any]]) -> str:
    """What METADATA_KEY says in a file whose layers have these settings."""
    return json.dumps({"format_version": "1.0", "layers": settings})
