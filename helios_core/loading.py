"""From a checkpoint to a transformer in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .checkpoint import Checkpoint, loaded_dtypes, open_checkpoint
from .quantised import ONE_SCALE, read_parts
from .quoting import some
from .regular_file import CheckpointError
from .safetensors_file import read_tensors
from .scaled_linear import ScaledLinear, dequantise
from .transformer import HeliosTransformer


def load_transformer(path: Path | str, dtype: torch.dtype = torch.bfloat16) -> HeliosTransformer:
    """The transformer of a .safetensors file or of a Helios repository's folder, on the CPU, its matrices in dtype.

    Those that the file holds as scaled fp8 stay so, and compute in dtype. Raises CheckpointError for what is no whole
    Helios transformer, and for quantised formats that need ComfyUI.
    """
    checkpoint = open_checkpoint(Path(path))
    network = HeliosTransformer(checkpoint.config, dtype=dtype, device="meta")
    if others := {layer.format for layer in checkpoint.quantised.values()} - ONE_SCALE.keys():
        raise CheckpointError(f"{path} has layers in {some(sorted(others))}, which only ComfyUI computes with.")
    layers = checkpoint.quantised_blocks
    replace_layers(network, layers, lambda name, linear: ScaledLinear(linear, ONE_SCALE[layers[name].format]))
    load_weights(network, checkpoint, dtype)
    return network.eval().requires_grad_(False)


def replace_layers(network: nn.Module, names: Iterable[str], make: Callable[[str, nn.Linear], nn.Module]) -> None:
    """Put what `make` makes of a Linear of a network, and of its name, in its place; names: of all of them."""
    for name in names:
        parent, _, child = name.rpartition(".")
        linear = network.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        setattr(network.get_submodule(parent), child, make(name, linear))


def load_weights(
    network: nn.Module,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    on_tensor: Callable[[], None] = lambda: None,
    marks: Mapping[str, Tensor] | None = None,
) -> None:
    """Give a network, which may be on meta, a checkpoint's weights on the CPU, its matrices in dtype.

    Weights that are stored as they are used stay mapped to the file; the others are converted one by one, so this
    takes no more memory than they do in the end. on_tensor is called after each. marks: what else the layers that
    `replace_layers` has put there ask for.
    """
    # Not from the network's own parameters: newer hosts on Windows make a Linear's only when weights are loaded.
    targets = loaded_dtypes(checkpoint, dtype)
    decoded = checkpoint.quantised.keys() - checkpoint.quantised_blocks.keys()
    stored = {f"{layer}.weight": checkpoint.tensors[f"{layer}.weight"].dtype for layer in decoded}
    weights = dict(marks or {})
    for name, tensor in read_tensors(checkpoint.tensors, (targets | stored).__getitem__):
        weights[name] = tensor
        if name in stored:
            scale = read_parts(checkpoint.quantised[name.removesuffix(".weight")])["weight_scale"]
            weights[name] = dequantise(tensor, scale, torch.float32).to(targets[name])
        on_tensor()
    for layer, quantised in checkpoint.quantised_blocks.items():
        weights |= {f"{layer}.{part}": values for part, values in read_parts(quantised).items()}
    network.load_state_dict(weights, assign=True)
