"""The names that LoRA files have for the modules of a Helios transformer.

Trainers write the names of the code they train with: diffusers', which are Helios' own, or those of Wan 2.1, the model
that Helios was made from, whose LoRAs fit it. Each puts its prefix in front, and some write `_` for every dot.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

DOTTED = ("diffusion_model.", "transformer.", "base_model.model.", "")
UNDERSCORED = ("lora_unet_", "lora_unet__", "lycoris_")
WAN = (
    (r"\battn1\b", "self_attn"),
    (r"\battn2\b", "cross_attn"),
    (r"\bto_([qkv])$", r"\1"),
    (r"\bto_out\.0$", "o"),
    (r"\bnorm2$", "norm3"),
    (r"\bffn\.net\.0\.proj$", "ffn.0"),
    (r"\bffn\.net\.2$", "ffn.2"),
    (r"^blocks\.(\d+)\.scale_shift_table$", r"blocks.\1.modulation"),
    (r"^norm_out\.scale_shift_table$", "head.modulation"),
    (r"^proj_out$", "head.head"),
    (r"^condition_embedder\.time_proj$", "time_projection.1"),
    (r"^condition_embedder\.text_embedder\.linear_1$", "text_embedding.0"),
    (r"^condition_embedder\.text_embedder\.linear_2$", "text_embedding.2"),
    (r"^condition_embedder\.time_embedder\.linear_1$", "time_embedding.0"),
    (r"^condition_embedder\.time_embedder\.linear_2$", "time_embedding.2"),
)


def wan_name(module: str) -> str:
    """What Wan 2.1's own code calls a module of ours; the same where it has none like it."""
    for pattern, name in WAN:
        module = re.sub(pattern, name, module)
    return module


def spellings(module: str) -> Iterator[str]:
    """Every name that a LoRA file may have for a module of `HeliosTransformer`."""
    for name in dict.fromkeys((module, wan_name(module))):
        yield from (prefix + name for prefix in DOTTED)
        yield from (prefix + name.replace(".", "_") for prefix in UNDERSCORED)


def lora_names(weights: Iterable[str]) -> Mapping[str, str]:
    """Modules as LoRA files spell them, and the name of the weight of each in `weights`, of `HeliosTransformer`."""
    modules = (name.removesuffix(".weight") for name in weights if name.endswith(".weight"))
    return {spelled: f"{module}.weight" for module in modules for spelled in spellings(module)}
