"""The formats in which convert_checkpoint.py can hold the blocks' matrices, and what makes them.

Scaled fp8 is the core's own. The others are made by comfy-kitchen, which ComfyUI computes with and brings along.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from helios_core.quantised import ROTATED_TOGETHER, ROTATES, SCALED_TOGETHER, USUAL, QuantisedLayer, Shape
from helios_core.regular_file import CheckpointError
from helios_core.scaled_linear import quantise, relative_error, scale_of

ROTATIONS = (256, 64, 16)  # columns at once: the most that divide a matrix, of the published ones 256


class Quantiser(Protocol):
    """Makes one of the formats."""

    @property
    def format(self) -> str:
        """What ComfyUI calls it."""

    @property
    def parts(self) -> tuple[str, ...]:
        """What it makes of a matrix, by the names that files have for it: the weight, and what lies beside."""

    def settings(self, columns: int) -> dict[str, Any]:
        """What a file says of a layer, for ComfyUI to read it by. CheckpointError where it cannot be made."""

    def make(self, weight: Tensor) -> tuple[dict[str, Tensor], float]:
        """The parts of a float32 matrix, and their error: root mean square, as a fraction of the matrix's own."""


class ScaledFp8:
    format = "float8_e4m3fn"
    parts = ("weight", "weight_scale")

    def settings(self, columns: int) -> dict[str, Any]:
        return {"format": self.format}

    def make(self, weight: Tensor) -> tuple[dict[str, Tensor], float]:
        scale = scale_of(weight)
        quantised = quantise(weight, scale)
        return {"weight": quantised, "weight_scale": scale}, relative_error(weight, quantised, scale)


@dataclass(frozen=True)
class ByKitchen:
    """A format of comfy-kitchen's. Where it rotates, columns are mixed before rounding, which spreads outliers."""

    format: str
    layout: str  # comfy-kitchen's class
    parts: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)  # of the class, which files do not say
    told: Mapping[str, Any] = field(default_factory=dict)  # likewise, which they do
    rotates: bool = False

    def settings(self, columns: int) -> dict[str, Any]:
        self._kitchen()
        return {"format": self.format, **self._told(columns)}

    def make(self, weight: Tensor) -> tuple[dict[str, Tensor], float]:
        packed = self.pack(weight)
        change = packed.dequantize().sub_(weight)
        parts = {name: part.contiguous() for name, part in packed.state_dict("weight").items()}
        return parts, (change.norm() / weight.norm().clamp(min=1e-30)).item()

    def pack(self, weight: Tensor) -> Any:
        """A matrix as comfy-kitchen's kind of tensor, which multiplies in the format."""
        return self._kitchen().QuantizedTensor.from_float(
            weight, self.layout, **self.options, **self._told(weight.shape[1])
        )

    def _told(self, columns: int) -> dict[str, Any]:
        if not self.rotates:
            return dict(self.told)
        together = next((size for size in ROTATIONS if columns % size == 0), None)
        if together is None:
            raise CheckpointError(
                f"A matrix of {columns} columns cannot be {self.format}, which wants a multiple of {ROTATIONS[-1]}. "
                "Use fp8_scaled."
            )
        return {**self.told, ROTATED_TOGETHER: together}

    def _kitchen(self) -> Any:
        try:
            kitchen = importlib.import_module("comfy_kitchen.tensor")
            getattr(kitchen, self.layout)
        except (ImportError, AttributeError) as error:
            raise CheckpointError(
                f"This format is made by comfy-kitchen 0.2.31 or newer, which this Python does not have ({error}). Run "
                "the script with that of ComfyUI 0.33 or newer, which is also what loads such files, or use fp8_scaled."
            ) from error
        return kitchen


QUANTISERS: dict[str, Quantiser] = {
    "fp8_scaled": ScaledFp8(),
    "int8": ByKitchen(
        "int8_tensorwise",
        "TensorWiseINT8Layout",
        ("weight", "weight_scale"),
        options={"per_channel": True},
        told={ROTATES: True},
        rotates=True,
    ),
    "w4a8": ByKitchen(
        "asym_w4a8_int8",
        "AsymW4A8Int8Layout",
        ("weight", "weight_s_rel", "weight_s_channel", "weight_codebook"),
        told={SCALED_TOGETHER: USUAL[SCALED_TOGETHER]},
        rotates=True,
    ),
    "nvfp4": ByKitchen("nvfp4", "TensorCoreNVFP4Layout", ("weight", "weight_scale", "weight_scale_2")),
}


def planned_parts(
    quantiser: Quantiser, settings: dict[str, Any], rows: int, columns: int
) -> dict[str, tuple[torch.dtype, Shape]]:
    """Type and shape of each part that it will make, by its settings, of a matrix of this size."""
    kinds = QuantisedLayer(quantiser.format, settings, {}).kinds(rows, columns)
    return {part: (kinds[part].dtypes[0], kinds[part].shapes[0]) for part in quantiser.parts}
