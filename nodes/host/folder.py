"""CLIP and VAE of the host from a Helios repository's folder, which is in diffusers' layout."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...helios_core.safetensors_file import some

LATENT_CHANNELS = 16
DOWNLOAD = "Download it from the same Helios repository (BestWishYsh/Helios-Distilled, -Mid or -Base)."

# Sizes of UMT5-XXL, the ones the host builds unless it is told others.
UMT5_XXL = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24, "vocab_size": 256384}
# The host has no option for these, and a file that does not name one means the same value.
UMT5_FIXED = {
    "model_type": ("umt5",),
    "is_gated_act": (True,),
    "dense_act_fn": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-6,),
    "relative_attention_num_buckets": (32,),
    "relative_attention_max_distance": (128,),
}
# By the presence and shape of this tensor the host (0.3.75: last axis, 0.24: first) tells UMT5-XXL from other encoders.
UMT5_MARK = "encoder.block.23.layer.1.DenseReluDense.wi_1.weight"
UMT5_NORM = "encoder.final_layer_norm.weight"  # the host makes the encoder in the dtype of this tensor

WAN_VAE_FIXED = {
    "z_dim": (LATENT_CHANNELS,),
    "dim_mult": ([1, 2, 4, 4],),
    "num_res_blocks": (2,),
    "attn_scales": ([],),
    "temperal_downsample": ([False, True, True],),
    "is_residual": (False,),
    "patch_size": (None,),
}
# diffusers' names for parts of the Wan 2.1 VAE -> those of the original, which the host knows.
WAN_VAE_NAMES = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
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
)
WAN_UP_BLOCK = re.compile(r"\.up_blocks\.(\d+)\.(?:resnets\.(\d+)|upsamplers\.0)\.")
RESNETS_PER_UP_BLOCK = 3


def load_text_encoder(
    folder: Path, dtype: torch.dtype | None = None, *, disable_dynamic: bool = False
) -> comfy.sd.CLIP:
    """CLIP (type wan) from `folder`/text_encoder and `folder`/tokenizer/spiece.model, its weights in `dtype`.

    None keeps 16-bit weights and turns the published fp32 ones into the host's own choice for text encoders. Takes no
    more memory than the weights in that dtype. Raises ValueError for a missing, incomplete or foreign part.
    """
    part = _part(folder, "text_encoder")
    config = _config(part, UMT5_FIXED)
    if missing := UMT5_XXL.keys() - config.keys():
        raise ValueError(f"{part / 'config.json'} does not say {some(sorted(missing))}. {DOWNLOAD}")
    tensors = _text_tensors(part, config)
    target = dtype or _usual_dtype(tensors[UMT5_NORM].dtype)
    if _host_assigns(disable_dynamic):
        tensors = {name: tensor.to(target) for name, tensor in tensors.items()}
    else:  # the host copies, and copying casts: the rest stays mapped to the file until then
        tensors[UMT5_NORM] = tensors[UMT5_NORM].to(target)

    options: dict[str, Any] = {}
    if sizes := {name: config[name] for name, xxl in UMT5_XXL.items() if config[name] != xxl}:
        if UMT5_MARK in tensors:
            raise ValueError(f"{part} holds a UMT5 of 24 or more blocks that is not the XXL one: {sizes}. {DOWNLOAD}")
        options["umt5xxl_model_config"] = sizes
        tensors[UMT5_MARK] = torch.zeros((), dtype=target).expand(UMT5_XXL["d_ff"], UMT5_XXL["d_model"])
    clip = comfy.sd.load_text_encoder_state_dicts(
        [{**tensors, "spiece_model": _sentencepiece(folder)}],
        clip_type=comfy.sd.CLIPType.WAN,
        model_options=options,
        **({"disable_dynamic": True} if disable_dynamic else {}),  # 0.3.75 does not know it, and does not ask for it
    )
    clip.patcher.cached_patcher_init = (_text_encoder_patcher, (folder, dtype))
    return clip


def load_vae(folder: Path) -> comfy.sd.VAE:
    """VAE from `folder`/vae. Raises ValueError for a missing or incomplete part, or one that is no Wan 2.1 VAE."""
    part = _part(folder, "vae")
    _config(part, WAN_VAE_FIXED)
    tensors = {_original_name(name): t for name, t in _weights(part, "diffusion_pytorch_model").items()}
    if not tensors.keys() >= {"decoder.middle.0.residual.0.gamma", "decoder.head.0.gamma"}:  # what the host goes by
        raise ValueError(f"The weights in {part} are not those of a Wan 2.1 VAE. {DOWNLOAD}")
    vae = comfy.sd.VAE(sd=tensors)
    _check_names(part, tensors.keys(), vae.get_sd().keys())
    vae.patcher.cached_patcher_init = (_vae_patcher, (folder,))
    return vae


def _text_encoder_patcher(folder: Path, dtype: torch.dtype | None, disable_dynamic: bool = False) -> Any:
    return load_text_encoder(folder, dtype, disable_dynamic=disable_dynamic).patcher


def _vae_patcher(folder: Path, disable_dynamic: bool = False) -> Any:
    return load_vae(folder).patcher  # like the host's own: its VAE has no such switch


def _text_tensors(part: Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
    tensors = _weights(part, "model")
    embedding = tensors.pop("encoder.embed_tokens.weight", None)  # the same weights under a second name
    if embedding is not None:
        tensors.setdefault("shared.weight", embedding)
    expected = _umt5_shapes(config)
    _check_names(part, tensors.keys(), expected.keys())
    wrong = [f"{k} {tuple(t.shape)} for {expected[k]}" for k, t in tensors.items() if tuple(t.shape) != expected[k]]
    if wrong:
        raise ValueError(f"{part} has weights of another shape than its config.json says: {some(wrong)}. {DOWNLOAD}")
    return tensors


def _umt5_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    width, inner, hidden = config["d_model"], config["d_kv"] * config["num_heads"], config["d_ff"]
    block: dict[str, tuple[int, ...]] = {
        "layer.0.layer_norm.weight": (width,),
        "layer.0.SelfAttention.relative_attention_bias.weight": (32, config["num_heads"]),
        "layer.0.SelfAttention.o.weight": (width, inner),
        "layer.1.layer_norm.weight": (width,),
        "layer.1.DenseReluDense.wi_0.weight": (hidden, width),
        "layer.1.DenseReluDense.wi_1.weight": (hidden, width),
        "layer.1.DenseReluDense.wo.weight": (width, hidden),
    }
    block |= {f"layer.0.SelfAttention.{x}.weight": (inner, width) for x in "qkv"}
    shapes = {f"encoder.block.{i}.{k}": shape for i in range(config["num_layers"]) for k, shape in block.items()}
    return {"shared.weight": (config["vocab_size"], width), UMT5_NORM: (width,)} | shapes


def _usual_dtype(stored: torch.dtype) -> torch.dtype:
    if stored.itemsize <= 2:
        return stored
    return comfy.model_management.text_encoder_dtype(comfy.model_management.text_encoder_device())


def _host_assigns(disable_dynamic: bool) -> bool:
    """Whether the host makes the tensors it is given its parameters (dynamic VRAM, 0.16 and later), or copies them."""
    patcher = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    return patcher is not comfy.model_patcher.ModelPatcher and not disable_dynamic


def _sentencepiece(folder: Path) -> Tensor:
    file = _part(folder, "tokenizer") / "spiece.model"
    if not file.is_file():
        raise ValueError(f"{file} is missing: the tokenizer of the text encoder. {DOWNLOAD}")
    return torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8)


def _original_name(name: str) -> str:
    """A tensor's name in the original Wan 2.1 VAE, from diffusers' name."""
    if up := WAN_UP_BLOCK.search(name):  # the original counts resnets and upsamplers through, over all blocks
        index = int(up[1]) * (RESNETS_PER_UP_BLOCK + 1) + int(up[2] or RESNETS_PER_UP_BLOCK)
        name = f"{name[: up.start()]}.upsamples.{index}.{name[up.end() :]}"
    for pattern, replacement in WAN_VAE_NAMES:
        name = pattern.sub(replacement, name)
    return name


def _part(folder: Path, name: str) -> Path:
    part = Path(folder) / name
    if not part.is_dir():
        raise ValueError(f"{folder} has no folder {name!r}. {DOWNLOAD}")
    return part


def _config(part: Path, fixed: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """`part`/config.json. Raises ValueError where it has another value than those that the host can build."""
    values = _read_json(part / "config.json")
    for name, allowed in fixed.items():
        if values.get(name, allowed[0]) not in allowed:
            raise ValueError(
                f"{part / 'config.json'} has {name} {values[name]!r}, but the {part.name} of Helios has "
                f"{' or '.join(map(repr, allowed))}. {DOWNLOAD}"
            )
    return values


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"{file} is missing. {DOWNLOAD}")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no valid JSON ({error}). {DOWNLOAD}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds no JSON object. {DOWNLOAD}")
    return values


def _weights(part: Path, stem: str) -> dict[str, Tensor]:
    """All tensors of a part, mapped to the files they are in."""
    tensors: dict[str, Tensor] = {}
    for file in _weight_files(part, stem):
        if not file.is_file():
            raise ValueError(f"{file} is missing: weights of the {part.name}. {DOWNLOAD}")
        try:
            with safe_open(file, framework="pt") as stored:
                tensors |= {name: stored.get_tensor(name) for name in stored.keys()}
        except SafetensorError as error:
            raise ValueError(f"{file} is truncated or no safetensors file ({error}). {DOWNLOAD}") from error
    return tensors


def _weight_files(part: Path, stem: str) -> list[Path]:
    index = part / f"{stem}.safetensors.index.json"
    if not index.is_file():
        return [part / f"{stem}.safetensors"]
    names = set((_read_json(index).get("weight_map") or {}).values())
    # Only names are judged: a download cache links to files elsewhere, an index must not point there.
    if not names or not all(isinstance(n, str) and re.fullmatch(r"[\w.-]+\.safetensors", n) for n in names):
        raise ValueError(f"{index} does not name the .safetensors files beside it. {DOWNLOAD}")
    return [part / name for name in sorted(names)]


def _check_names(part: Path, given: Any, expected: Any) -> None:
    missing, unexpected = sorted(expected - given), sorted(given - expected)
    if missing or unexpected:
        raise ValueError(
            f"The weights in {part} do not fit: {len(missing)} missing{': ' if missing else ''}{some(missing)}; "
            f"{len(unexpected)} unexpected{': ' if unexpected else ''}{some(unexpected)}. {DOWNLOAD}"
        )
