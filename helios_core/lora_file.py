"""LoRA files: what is in them, and which of it fits a Helios transformer. Only headers are read here."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import is_number
from .json_file import parse_json
from .lora_names import lora_names
from .quoting import printable, quoted, some
from .regular_file import CheckpointError
from .safetensors_file import DTYPES, StoredTensor, read_headers

Shape = tuple[int, ...]

LORA = "lora_down.weight"  # the part that a LoRA cannot lack
ALPHA_KEY = "lora_adapter_metadata"  # where diffusers, and with it Helios' own training, writes alpha
TRAINED = "transformer."  # in front of the keys there

# Ways to write the same part of a module, and the one that hosts know from every trainer.
PARTS = (
    # What no host applies to the same effect: with it the module fits no weight and is left out.
    (r"\.(lora_magnitude_vector|lora_mid|lora_[AB](?:\.\w+)?\.bias)\b.*$", "inapplicable"),
    (r"\.lora_(?:A|down)(?:\.(?!weight)\w+)?(?:\.weight)?$", "lora_down.weight"),
    (r"\.lora_(?:B|up)(?:\.(?!weight)\w+)?(?:\.weight)?$", "lora_up.weight"),
    (r"[._]lora(?:_linear_layer)?\.down\.weight$", "lora_down.weight"),
    (r"[._]lora(?:_linear_layer)?\.up\.weight$", "lora_up.weight"),
    (r"\.(alpha|dora_scale|diff|diff_b|set_weight)$", r"\1"),
    (r"\.(hada_w[12]_[ab]|lokr_w[12](?:_[ab])?)$", r"\1"),
)
IN_WANS_NAMES = re.compile(r"(self|cross)_attn|ffn[._][02]\b|modulation|head[._]head|(time|text)_embedding")
READS_IMAGE = re.compile(r"(k_img|v_img|img_emb|add_k_proj|add_v_proj|image_embedder)")
WIDTHS = {1536: "Wan 2.1 1.3B", 3072: "Wan 2.2 5B"}  # a model of Wan's that is no 14B, by a side of its matrices
FOREIGN = (
    (r"double_blocks|single_transformer_blocks", "Flux or HunyuanVideo"),
    (r"joint_blocks", "Stable Diffusion 3"),
    (r"lora_te|input_blocks|down_blocks|text_model_encoder", "Stable Diffusion 1, 2 or XL"),
    (r"transformer_blocks", "LTX-Video, Qwen-Image or another model of diffusers"),
    (r"(^|[._])layers[._]\d", "Lumina, Z-Image or another model"),
    (r"(self_attn|attn1)[._]", "a Wan model of another size"),
)


Changes = Mapping[str, Mapping[str, StoredTensor]]
"""By weight of the transformer, and by part of the change."""


@dataclass(frozen=True)
class LoraFile:
    """The headers of one LoRA file, sorted by what a transformer can do with them."""

    path: Path
    kind: str  # "a LoRA of rank 64", and in whose names
    changes: Changes  # what fits
    alphas: Mapping[str, float]  # by weight, where only the metadata has it
    total: int  # tensors in the file
    left_out: str | None  # what does not fit, for a message

    @property
    def used(self) -> int:
        """How many tensors fit."""
        return sum(map(len, self.changes.values()))


def open_lora(path: Path, weights: Mapping[str, Shape]) -> LoraFile:
    """Read and check the header of a LoRA file for a transformer of these weights, by name their shapes.

    Raises CheckpointError for what is no safetensors file or damaged, and where nothing in it fits.
    """
    stored, metadata = read_headers([path])
    if wrong := [tensor.key for tensor in stored.values() if tensor.dtype not in DTYPES.values()]:
        raise CheckpointError(
            f"{path} stores {len(wrong)} tensors in a type that is none of {some(DTYPES)}: {some(wrong)}. "
            "Save the LoRA in bf16."
        )
    found, unknown = by_weight(path, stored, weights)
    changes = {
        weight: parts
        for weight, parts in found.items()
        if fits({part: tensor.shape for part, tensor in parts.items()}, weights[weight])
    }
    misfits = [x for weight, parts in found.items() if weight not in changes for x in parts.values()]
    if not changes:
        raise CheckpointError(_no_fit(path, stored, misfits))
    left_out = _left_out(unknown, [tensor.key for tensor in misfits], len(stored))
    return LoraFile(path, _kind(changes), changes, metadata_alphas(path, metadata, changes), len(stored), left_out)


def fits(parts: Mapping[str, Shape], weight: Shape) -> bool:
    """Whether these parts, by their shapes, make a change of a weight of this shape."""
    matrix = (weight[0], math.prod(weight[1:]))
    values = set(parts) - {"alpha", "dora_scale"}
    scale = parts.get("dora_scale", weight)
    if math.prod(parts.get("alpha", ())) != 1 or len(scale) != len(weight) or not set(scale) <= {1, *weight}:
        return False
    if len(values) == 1 and values <= {"diff", "set_weight"}:
        return parts[values.pop()] == weight
    if values == {"lora_down.weight", "lora_up.weight"}:
        down, up = parts["lora_down.weight"], parts["lora_up.weight"]
        return len(down) > 1 and len(up) > 1 and up[1] == down[0] and (up[0], math.prod(down[1:])) == matrix
    if values == {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}:
        return _matrix(parts, "hada_w1") == _matrix(parts, "hada_w2") == matrix
    if all(part.startswith("lokr_") for part in values):
        left, right = _matrix(parts, "lokr_w1"), _matrix(parts, "lokr_w2")
        return left is not None and right is not None and (left[0] * right[0], left[1] * right[1]) == matrix
    return False


def _matrix(parts: Mapping[str, Shape], name: str) -> tuple[int, int] | None:
    """Rows and columns of a matrix that is there as a whole, or as a product of two; None if it is not."""
    if whole := parts.get(name):
        return whole[0], math.prod(whole[1:])
    first, second = parts.get(f"{name}_a", ()), parts.get(f"{name}_b", ())
    return (first[0], second[1]) if len(first) == len(second) == 2 and first[1] == second[0] else None


def by_weight(path: Path, stored: Mapping[str, StoredTensor], weights: Collection[str]) -> tuple[Changes, list[str]]:
    """The tensors by weight and part, and the keys of those that are no part of a LoRA on these weights."""
    known = {**lora_names(weights), **{f"diffusion_model.{name}": name for name in weights}}
    found: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
    unknown = []
    for key, tensor in stored.items():
        module, part = split_key(key)
        weight = known.get(module, "")
        if part == "diff_b":
            weight, part = weight.removesuffix(".weight") + ".bias", "diff"
        if part is None or weight not in weights:
            unknown.append(key)
        elif part in found[weight]:
            raise CheckpointError(
                f"{path} holds {quoted(found[weight][part].key)} and {quoted(key)}, which are the same. Remove one."
            )
        else:
            found[weight][part] = tensor
    return found, unknown


def split_key(key: str) -> tuple[str, str | None]:
    """A key's module, and its part by the name that hosts know; no part for what is none of a LoRA's."""
    for pattern, part in PARTS:
        if match := re.search(pattern, key):
            return key[: match.start()], match.expand(part)
    return key, None


def _kind(changes: Changes) -> str:
    parts = {part for tensors in changes.values() for part in tensors}
    ranks = Counter(tensors[LORA].shape[0] for tensors in changes.values() if LORA in tensors)
    if ranks:
        kind = f"a {'DoRA' if 'dora_scale' in parts else 'LoRA'} of rank {ranks.most_common(1)[0][0]}"
    elif any(part.startswith("hada_") for part in parts):
        kind = "a LoHa"
    elif any(part.startswith("lokr_") for part in parts):
        kind = "a LoKr"
    else:
        kind = "whole weights" if parts == {"set_weight"} else "differences of whole weights"
    wans = any(IN_WANS_NAMES.search(tensor.key) for tensors in changes.values() for tensor in tensors.values())
    return f"{kind}, in the names of {'Wan' if wans else 'Helios'}"


def metadata_alphas(path: Path, metadata: Mapping[str, str], changes: Changes) -> dict[str, float]:
    """What the metadata says of alpha, for the weights that have none of their own."""
    if ALPHA_KEY not in metadata:
        return {}
    try:
        values = parse_json(metadata[ALPHA_KEY].encode())
    except ValueError as error:
        raise CheckpointError(f"The metadata {ALPHA_KEY!r} of {path} is damaged ({error}). Save it again.") from error
    config = {key.removeprefix(TRAINED): value for key, value in values.items() if key.startswith(TRAINED)}
    found: dict[str, float] = {}
    for weight, parts in changes.items():
        alpha = _for_module(weight.removesuffix(".weight"), config.get("alpha_pattern"), config.get("lora_alpha"))
        if LORA not in parts or "alpha" in parts or alpha is None:
            continue
        if not is_number(alpha):
            raise CheckpointError(f"The metadata of {path} has the alpha {quoted(alpha)}, which is no number.")
        # Rank-stabilised: divided by the root of the rank, where what reads this divides by the rank.
        root = math.sqrt(parts[LORA].shape[0]) if config.get("use_rslora") is True else 1.0
        found[weight] = alpha * root
    return found


def _for_module(module: str, pattern: Any, default: Any) -> Any:
    """PEFT's rule, for names: the value of the first name that the module's ends in."""
    names = pattern if isinstance(pattern, dict) else {}
    return next((names[name] for name in names if f".{module}".endswith(f".{name}")), default)


def _left_out(unknown: list[str], misfits: list[str], total: int) -> str | None:
    reasons = (
        ([key for key in unknown if READS_IMAGE.search(key)], "read an image, as in Wan's image-to-video models"),
        (
            misfits,
            "have another shape than the model, lack a part, or go with one that no host applies",
        ),
        ([key for key in unknown if not READS_IMAGE.search(key)], "are not known by their names"),
    )
    told = [f"{len(keys)} {reason}, such as {printable(keys[0])}" for keys, reason in reasons if keys]
    return f"{len(unknown) + len(misfits)} of {total} tensors were left out: {'; '.join(told)}." if told else None


def _no_fit(path: Path, stored: Mapping[str, StoredTensor], misfits: list[StoredTensor]) -> str:
    if any(key.endswith("patch_short.weight") for key in stored):
        if any(key.endswith("proj_out.weight") for key in stored):
            return f"{path} is a whole Helios model, no LoRA. Load it with Helios Model Loader."
        return f"{path} has whole weights of a training, no LoRA. scripts/convert_lora.py makes one of it and its LoRA."
    begins = f"It begins with {some(list(stored)[:1])}."
    if not any(split_key(key)[1] for key in stored):
        return f"{path} is no LoRA: none of its {len(stored)} tensors has the name of a LoRA's. {begins}"
    model = next((WIDTHS[side] for tensor in misfits for side in tensor.shape if side in WIDTHS), None)
    model = model or next(
        (model for pattern, model in FOREIGN if any(re.search(pattern, key) for key in stored)), "another model"
    )
    why = "has the shape that this model needs" if misfits else "has a name that Helios has"
    return (
        f"{path} is a LoRA for {model}: none of its {len(stored)} tensors {why}. Choose one for Helios, or for Wan 2.1 "
        f"T2V 14B. {begins}"
    )
