"""Scaled fp8 on a GPU, beside bf16 of the same random weights: all blocks, decoded for each product or multiplied as
they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import network_gpu
import torch
from card import Shape
from measure import Row, in_turns
from torch import Tensor, nn

from harness.errors import mean_error
from helios_core.loading import replace_layers
from helios_core.scaled_linear import LARGEST, ScaledLinear, quantise, scale_of
from helios_core.transformer import HeliosTransformer


class Product(ScaledLinear):
    """Multiplies in fp8, what comes in rounded without a scale, as newer ComfyUI does on cards that can."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2).clamp(-LARGEST, LARGEST).to(self.weight.dtype)
        one = torch.ones((), device=x.device)
        product = torch._scaled_mm(flat, self.weight.t(), one, self.weight_scale, self.bias, out_dtype=x.dtype)
        return product.unflatten(0, x.shape[:-1])


def rows(shape: Shape) -> Iterator[Row]:
    network = network_gpu.transformer(shape)
    weights = quantised(network)
    for label, layer in {"fp8_scaled": ScaledLinear, "fp8_product": Product}.items():
        small = with_layers(network, weights, layer)
        yield Row.compare(f"weights_{label}", size(small) / 1e9, size(network) / 1e9, "GB", "peer: bf16")
        yield from network_gpu.section(label, forwards(shape, small, network, label))


def forwards(shape: Shape, small: HeliosTransformer, network: HeliosTransformer, label: str) -> Iterator[Row]:
    for stage in range(3):
        args = network_gpu.inputs(shape, stage)
        ours, theirs = (partial(model, *args) for model in (small, network))
        error = mean_error(ours().float(), theirs().float())
        note = f"peer: bf16; differs by {100 * error:.2f} % of its values"
        yield Row.compare(f"forward_stage{stage}_{label}", *in_turns(ours, theirs, shape.turns), "s", note)


def quantised(network: HeliosTransformer) -> dict[str, Tensor]:
    """The weights with all matrices of the blocks in fp8."""
    weights = dict(network.state_dict())
    for layer in matrices(network):
        weight = weights[f"{layer}.weight"]
        weights[f"{layer}.weight_scale"] = scale_of(weight)
        weights[f"{layer}.weight"] = quantise(weight, weights[f"{layer}.weight_scale"])
    return weights


def with_layers(
    network: HeliosTransformer, weights: dict[str, Tensor], make: Callable[[nn.Linear], nn.Module]
) -> HeliosTransformer:
    """A network of these weights; what is not quantised it shares with the one that they are of."""
    small = HeliosTransformer(network.config, dtype=network.dtype, device="meta")
    replace_layers(small, matrices(small), lambda name, linear: make(linear))
    small.load_state_dict(weights, assign=True)
    return small.eval().requires_grad_(False)


def matrices(network: HeliosTransformer) -> list[str]:
    return [f"blocks.{name}" for name, x in network.blocks.named_modules() if isinstance(x, nn.Linear)]


def size(network: HeliosTransformer) -> int:
    return sum(x.nbytes for x in network.state_dict().values())
