"""VAE from an official Helios folder, whose file has diffusers' names."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import comfy.sd

from ...helios_core.config import LATENT_CHANNELS
from ...helios_core.regular_file import CheckpointError
from ...helios_core.safetensors_file import read_tensors
from .folder_parts import DOWNLOAD, check_names, misshapen, part_config, part_folder, stored_tensors

WAN_VAE_FIXED = {
    "z_dim": (LATENT_CHANNELS,),
    "dim_mult": ([1, 2, 4, 4],),
    "num_res_blocks": (2,),
    "attn_scales": ([],),
    "temperal_downsample": ([False, True, True],),
    "is_residual": (False,),
    "patch_size": (None,),
}
# In the original's names: the last layer, by whose width the host builds all, and one that grows with its square.
WAN_VAE_MARK, WAN_VAE_LARGE = "decoder.head.0.gamma", "decoder.middle.0.residual.2.weight"
SIZE_MISMATCH = re.compile(r"size mismatch for ([^:\s]+):")  # as torch says it
# diffusers' names for parts of the Wan 2.1 VAE -> those of the original, which the host knows.
WAN_VAE_NAMES = (
    (r"^quant_conv\.", "conv1."),
    (r"^post_quant_conv\.", "conv2."),
    (r"^(encoder|decoder)\.conv_in\.", r"\1.conv1."),
    (r"^(encoder|decoder)\.norm_out\.", r"\1.head.0."),
    (r"^(encoder|decoder)\.conv_out\.", r"\1.head.2."),
    (r"\.mid_block\.resnets\.0\.", ".middle.0."),
    (r"\.mid_block\.attentions\.0\.", ".middle.1."),
    (r"\.mid_block\.resnets\.1\.", ".middle.2."),
    (r"\.down_blocks\.", ".downsamples."),
    (r"\.norm1\.", ".residual.0."),
    (r"(?<=\d)\.conv1\.", ".residual.2."),
    (r"\.norm2\.", ".residual.3."),
    (r"(?<=\d)\.conv2\.", ".residual.6."),
    (r"\.conv_shortcut\.", ".shortcut."),
)
WAN_UP_BLOCK = re.compile(r"\.up_blocks\.(\d+)\.(?:resnets\.(\d+)|upsamplers\.0)\.")
RESNETS_PER_UP_BLOCK = 3


def load_vae(folder: Path) -> comfy.sd.VAE:
    """VAE from `folder`/vae. Raises CheckpointError for a missing or incomplete part, or one that is no Wan 2.1 VAE."""
    part = part_folder(folder, "vae")
    part_config(part, WAN_VAE_FIXED)
    stored = {_original_name(name): x for name, x in stored_tensors(part, "diffusion_pytorch_model").items()}
    if not stored.keys() >= {"decoder.middle.0.residual.0.gamma", WAN_VAE_MARK, WAN_VAE_LARGE}:  # what the host goes by
        raise CheckpointError(f"The weights in {part} are not those of a Wan 2.1 VAE. {DOWNLOAD}")
    width = 4 * math.prod(stored[WAN_VAE_MARK].shape)
    if stored[WAN_VAE_LARGE].shape != (width, width, 3, 3, 3):  # or the host builds what the file does not hold
        wrong = [f"{WAN_VAE_LARGE} {stored[WAN_VAE_LARGE].shape} for {(width, width, 3, 3, 3)}"]
        raise misshapen(part, "a Wan 2.1 VAE", wrong)
    tensors = dict(read_tensors(stored))
    try:
        vae = comfy.sd.VAE(sd=tensors)
    except RuntimeError as error:
        if wrong := SIZE_MISMATCH.findall(str(error)):
            raise misshapen(part, "a Wan 2.1 VAE", wrong) from error
        raise
    check_names(part, tensors.keys(), vae.get_sd().keys())
    vae.patcher.cached_patcher_init = (_vae_patcher, (folder,))
    return vae


def _vae_patcher(folder: Path, disable_dynamic: bool = False) -> Any:
    return load_vae(folder).patcher  # like the host's own: its VAE has no such switch


def _original_name(name: str) -> str:
    """A tensor's name in the original Wan 2.1 VAE, from diffusers' name."""
    if up := WAN_UP_BLOCK.search(name):  # the original counts resnets and upsamplers through, over all blocks
        index = int(up[1]) * (RESNETS_PER_UP_BLOCK + 1) + int(up[2] or RESNETS_PER_UP_BLOCK)
        name = f"{name[: up.start()]}.upsamples.{index}.{name[up.end() :]}"
    for pattern, replacement in WAN_VAE_NAMES:
        name = re.sub(pattern, replacement, name)
    return name
