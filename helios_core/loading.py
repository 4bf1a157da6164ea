"""From a checkpoint to a transformer in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from .checkpoint import Checkpoint, open_checkpoint, target_dtypes
from .safetensors_file import read_tensors
from .transformer import HeliosTransformer


def load_transformer(path: Path | str, dtype: torch.dtype = torch.bfloat16) -> HeliosTransformer:
    """The transformer of a .safetensors file or of a Helios repository's folder, on the CPU, its matrices in dtype.

    Raises CheckpointError for what is no whole Helios transformer.
    """
    checkpoint = open_checkpoint(Path(path))
    network = HeliosTransformer(checkpoint.config, dtype=dtype, device="meta")
    load_weights(network, checkpoint, dtype)
    return network.eval().requires_grad_(False)


def load_weights(
    network: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype, on_tensor: Callable[[], None] = lambda: None
) -> None:
    """Give a network, which may be on meta, a checkpoint's weights on the CPU, its matrices in dtype.

    Weights that are stored as they are used stay mapped to the file; the others are converted one by one, so this
    takes no more memory than they do in the end. on_tensor is called after each.
    """
    # Not from the network's own parameters: newer hosts on Windows make a Linear's only when weights are loaded.
    targets = target_dtypes(checkpoint.config, dtype)
    weights = {}
    for name, tensor in read_tensors(checkpoint.tensors, targets.__getitem__):
        weights[name] = tensor
        on_tensor()
    network.load_state_dict(weights, assign=True)
