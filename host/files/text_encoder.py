"""CLIP from the text encoder of an official Helios folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import sentencepiece
import torch
from torch import Tensor

from ...helios_core.quoting import quoted
from ...helios_core.regular_file import CheckpointError, open_regular
from ...helios_core.safetensors_file import read_tensors
from ..compat import usual_patcher, without_dynamic
from .folder_parts import DOWNLOAD, check_names, misshapen, part_config, part_folder, stored_tensors

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
UMT5_BLOCK = re.compile(r"encoder\.block\.(\d+)\.")
LARGEST_SIZE = 2**20  # of any number in the configuration; the vocabulary has 256,384
MAX_SENTENCEPIECE = 64 * 2**20  # bytes; UMT5's has 4.5 MB


def load_text_encoder(
    folder: Path, dtype: torch.dtype | None = None, *, disable_dynamic: bool = False
) -> comfy.sd.CLIP:
    """CLIP (type wan) from `folder`/text_encoder and `folder`/tokenizer/spiece.model, its weights in `dtype`.

    None keeps 16-bit weights and turns the published fp32 ones into the host's own choice for text encoders. Takes no
    more memory than the weights in that dtype. Raises CheckpointError for a missing, incomplete or foreign part.
    """
    part = part_folder(folder, "text_encoder")
    config = part_config(part, UMT5_FIXED)
    for name in UMT5_XXL:
        if type(size := config.get(name)) is not int or not 1 <= size <= LARGEST_SIZE:
            raise CheckpointError(
                f"{part / 'config.json'} has {name} {quoted(size)}, which is no whole number from 1 to "
                f"{LARGEST_SIZE}. {DOWNLOAD}"
            )
    tokenizer = _sentencepiece(folder, config["vocab_size"])
    tensors = _text_tensors(part, config)
    target = dtype or _usual_dtype(tensors[UMT5_NORM].dtype)
    if _host_assigns(disable_dynamic):
        tensors = {name: tensor.to(target) for name, tensor in tensors.items()}
    else:  # the host copies, and copying casts: the rest stays mapped to the file until then
        tensors[UMT5_NORM] = tensors[UMT5_NORM].to(target)

    options: dict[str, Any] = {}
    if sizes := {name: config[name] for name, xxl in UMT5_XXL.items() if config[name] != xxl}:
        if UMT5_MARK in tensors:
            raise CheckpointError(
                f"{part} holds a UMT5 of 24 or more blocks that is not the XXL one: {sizes}. {DOWNLOAD}"
            )
        options["umt5xxl_model_config"] = sizes
        tensors[UMT5_MARK] = torch.zeros((), dtype=target).expand(UMT5_XXL["d_ff"], UMT5_XXL["d_model"])
    clip = comfy.sd.load_text_encoder_state_dicts(
        [{**tensors, "spiece_model": tokenizer}],
        clip_type=comfy.sd.CLIPType.WAN,
        model_options=options,
        **without_dynamic(disable_dynamic),
    )
    clip.patcher.cached_patcher_init = (_text_encoder_patcher, (folder, dtype))
    return clip


def _text_encoder_patcher(folder: Path, dtype: torch.dtype | None, disable_dynamic: bool = False) -> Any:
    return load_text_encoder(folder, dtype, disable_dynamic=disable_dynamic).patcher


def _text_tensors(part: Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
    stored = stored_tensors(part, "model")
    embedding = stored.pop("encoder.embed_tokens.weight", None)  # the same weights under a second name
    if embedding is not None:
        stored.setdefault("shared.weight", embedding)
    blocks = len({found[1] for found in map(UMT5_BLOCK.match, stored) if found})
    if blocks != config["num_layers"]:  # before so many are listed
        raise CheckpointError(
            f"{part / 'config.json'} says that there are {config['num_layers']} blocks, but the weights have {blocks}. "
            f"{DOWNLOAD}"
        )
    expected = _umt5_shapes(config)
    check_names(part, stored.keys(), expected.keys())
    if wrong := [f"{k} {x.shape} for {expected[k]}" for k, x in stored.items() if x.shape != expected[k]]:
        raise misshapen(part, "its config.json says", wrong)
    return dict(read_tensors(stored))


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
    """Whether the host makes the tensors it is given its parameters (dynamic VRAM), or copies them."""
    return usual_patcher() is not comfy.model_patcher.ModelPatcher and not disable_dynamic


def _sentencepiece(folder: Path, vocabulary: int) -> Tensor:
    """The tokenizer's file, after checking that the text encoder has an embedding for each of its pieces."""
    file = part_folder(folder, "tokenizer") / "spiece.model"
    with open_regular(file) as (stream, facts):
        if facts.size > MAX_SENTENCEPIECE:
            raise CheckpointError(f"{file} has {facts.size} bytes, too many for a tokenizer. {DOWNLOAD}")
        content = stream.read(MAX_SENTENCEPIECE)
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_proto=content).get_piece_size() if content else 0
    except RuntimeError as error:  # it is no sentencepiece model
        raise CheckpointError(f"{file} is damaged ({error}). {DOWNLOAD}") from error
    if not 0 < pieces <= vocabulary:
        raise CheckpointError(
            f"{file} has {pieces} pieces, but the text encoder knows {vocabulary}: they do not belong together. "
            f"{DOWNLOAD}"
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)
