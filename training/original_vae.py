"""Write Helios-Tiny's VAE in the layout of the original Wan 2.1 file, for ComfyUI's Load VAE (models/vae).

`python training/original_vae.py helios_tiny_vae.safetensors`
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from parts import weights_folder
from safetensors.torch import save_file
from torch import Tensor

RESIDUAL = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6"}
ENDS = {"conv_in": "conv1", "norm_out": "head.0", "conv_out": "head.2"}
MIDDLE = {"resnets.0": "middle.0", "attentions.0": "middle.1", "resnets.1": "middle.2"}


def original_tensors(vae: AutoencoderKLWan) -> dict[str, Tensor]:
    """The VAE's weights by the names of the original file, which numbers all layers of a side in one row."""
    places = {"quant_conv": "conv1", "post_quant_conv": "conv2"}
    for side in ("encoder", "decoder"):
        places |= {
            f"{side}.{here}": f"{side}.{there}" for here, there in {**ENDS, **_inside(MIDDLE, "mid_block")}.items()
        }
    for number, _ in enumerate(vae.encoder.down_blocks):
        places[f"encoder.down_blocks.{number}"] = f"encoder.downsamples.{number}"
    number = 0
    for block, layers in enumerate(vae.decoder.up_blocks):
        rows = [f"resnets.{k}" for k in range(len(layers.resnets))] + ["upsamplers.0"] * (layers.upsamplers is not None)
        for row in rows:
            places[f"decoder.up_blocks.{block}.{row}"] = f"decoder.upsamples.{number}"
            number += 1
    return {_rename(name, places): tensor.contiguous() for name, tensor in vae.state_dict().items()}


def _inside(names: dict[str, str], part: str) -> dict[str, str]:
    return {f"{part}.{name}": there for name, there in names.items()}


def _rename(name: str, places: dict[str, str]) -> str:
    place = next(place for place in places if name.startswith(place + "."))
    rest = name[len(place) + 1 :]
    head, _, tail = rest.partition(".")
    if head in RESIDUAL:
        rest = f"{RESIDUAL[head]}.{tail}"
    elif head == "conv_shortcut":
        rest = f"shortcut.{tail}"
    return f"{places[place]}.{rest}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    vae = AutoencoderKLWan.from_pretrained(weights_folder() / "vae", torch_dtype=torch.bfloat16)
    save_file(original_tensors(vae), options.target)


if __name__ == "__main__":
    main()
