"""Helios checkpoints on disk: what is in them, and whether it is all there.

Only headers are read here; `safetensors_file.read_tensors` then reads the tensors.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast, get_args

import torch

from .config import TransformerConfig, Variant
from .json_file import parse_json, read_json, read_json_if_there
from .quantised import ONE_SCALE, QuantisedLayer, misfits, read_text, split_quantised
from .quoting import SHOWN, quoted, some
from .regular_file import CheckpointError, FileFacts
from .safetensors_file import DTYPES, PICKLES, StoredTensor, read_headers, read_index
from .transformer import HeliosTransformer

CONFIG_KEY, VARIANT_KEY = "helios_config", "helios_variant"  # in the metadata of files that we write
HEAD_DIM = 128  # of every published checkpoint; shapes alone do not tell it

IN_CHECKPOINTS = "model.diffusion_model."  # as ComfyUI saves models, alone or together with text encoder and VAE
PREFIXES = (IN_CHECKPOINTS, "diffusion_model.", "transformer.")
RENAMES = (
    (r"^time_embedding\.0\.", "condition_embedder.time_embedder.linear_1."),
    (r"^time_embedding\.2\.", "condition_embedder.time_embedder.linear_2."),
    (r"^time_projection\.1\.", "condition_embedder.time_proj."),
    (r"^text_embedding\.0\.", "condition_embedder.text_embedder.linear_1."),
    (r"^text_embedding\.2\.", "condition_embedder.text_embedder.linear_2."),
    (r"^(blocks\.\d+\.ffn)\.0\.", r"\1.net.0.proj."),
    (r"^(blocks\.\d+\.ffn)\.2\.", r"\1.net.2."),
    (r"^scale_shift_table\b", "norm_out.scale_shift_table"),
    (r"\b(scale_shift_table|history_key_scale)$", r"\1.weight"),
)
BARE = re.compile(r"\b(scale_shift_table|history_key_scale)\.weight$")  # in files without the `.weight`
BLOCK = re.compile(r"blocks\.(0|[1-9]\d{0,8})\.(.+)")  # number of a block, and a tensor's name in it
HISTORY_PATCHES = ("patch_short.weight", "patch_mid.weight", "patch_long.weight")  # no other model has them
IN_BLOCKS = "blocks."  # where quantised layers stay as they are; elsewhere little is saved by it
FOREIGN_QUANTISED = re.compile(r"(^|\.)(absmax|quant_map|quant_state\..+|weight_packed|qweight|qzeros)$")
FOREIGN = (
    (r"lora_(A|B|up|down)\.|lora_(A|B|up|down)$|\.lora\.", "a LoRA; a LoRA loader puts it on top of a model"),
    (r"(^|\.)blocks\.0\.self_attn\.q\.weight$", "a Wan 2.1 or 2.2 video model, which has no history memory"),
    (r"(^|\.)double_blocks\.0\.", "a Flux or HunyuanVideo model"),
    (r"(^|\.)joint_blocks\.0\.", "a Stable Diffusion 3 model"),
    (r"(^|\.)input_blocks\.0\.0\.", "a Stable Diffusion 1, 2 or XL model"),
    (r"(^|\.)block\.0\.layer\.0\.SelfAttention\.q\.weight$", "a T5 or UMT5 text encoder; load it as a CLIP"),
    (r"(^|\.)decoder\.(conv1|conv_in|head\.0)\.", "a VAE; load it with a VAE loader"),
    (r"(^|\.)blocks\.0\.attn1\.to_q\.weight$", "a Wan model in diffusers' layout, which has no history memory"),
)


@dataclass(frozen=True)
class Checkpoint:
    """The headers of one whole and fitting Helios transformer; `tensors` goes by `HeliosTransformer`'s own names.

    The weights of `quantised` layers are among them, in the dtype and shape that their formats pack them in.
    """

    path: Path
    config: TransformerConfig
    variant: Variant | None  # None where the files do not say
    tensors: Mapping[str, StoredTensor]
    quantised: Mapping[str, QuantisedLayer]  # by layer

    @property
    def files(self) -> frozenset[FileFacts]:
        """The files that hold the weights, as they were when they were opened."""
        parts = (part for layer in self.quantised.values() for part in layer.parts.values())
        return frozenset(tensor.source for tensor in itertools.chain(self.tensors.values(), parts))

    @property
    def quantised_blocks(self) -> dict[str, QuantisedLayer]:
        """The layers that stay quantised in memory. Others are decoded as they are read."""
        return {name: layer for name, layer in self.quantised.items() if name.startswith(IN_BLOCKS)}


def open_checkpoint(path: Path) -> Checkpoint:
    """Read and check the headers of a .safetensors file, a transformer folder or an official repository's folder.

    Raises CheckpointError unless the weights are those of a Helios transformer, with none missing, left over or of
    another shape. Key layouts and prefixes: diffusers' (older ones included) and ComfyUI's repack. Quantised: as
    ComfyUI does it, in any of `quantised.FORMATS`.
    """
    path = Path(path)
    if not os.path.exists(path):  # unlike Path.exists, never raises
        raise CheckpointError(f"{path} does not exist. Give a .safetensors file or a folder of a Helios repository.")
    if "transformer_ode" in (path.absolute().name, path.absolute().parent.name):
        raise CheckpointError(f"{path} is not the model that makes videos. Give the folder that holds transformer_ode.")
    folder = _transformer_folder(path) if os.path.isdir(path) else None
    stored, metadata = read_headers([path] if folder is None else _weight_files(folder))
    _refuse_foreign(path, stored)
    tensors, quantised = split_quantised(path, metadata, _canonical(path, stored), _own_layer)
    saved = tensors.pop(CONFIG_KEY, None)
    config = _config(path, folder, metadata, tensors, saved)
    _check(path, config, tensors, quantised)
    return Checkpoint(path, config, read_variant(path, metadata), tensors, quantised)


def own_name(name: str) -> str:
    """`HeliosTransformer`'s name for a tensor that is called this, without prefix, in some layout of files."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _own_layer(layer: str) -> str:
    """`HeliosTransformer`'s name for a layer that is called this, with or without prefix."""
    prefix = next((prefix for prefix in PREFIXES if layer.startswith(prefix)), "")
    return own_name(f"{layer.removeprefix(prefix)}.weight").removesuffix(".weight")


def published_name(name: str) -> str:
    """What the tensor of this name in `HeliosTransformer` is called in files, ours and the published ones."""
    return BARE.sub(r"\1", name)


def target_dtypes(config: TransformerConfig, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype that a transformer of this `dtype` keeps each of its tensors in: some are float32 in any case."""
    weights = HeliosTransformer(config, dtype=dtype, device="meta").state_dict()
    return {name: tensor.dtype for name, tensor in weights.items()}


def loaded_dtypes(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """`target_dtypes` of this checkpoint: quantised blocks stay as they are stored."""
    weights = (f"{layer}.weight" for layer in checkpoint.quantised_blocks)
    return target_dtypes(checkpoint.config, dtype) | {name: checkpoint.tensors[name].dtype for name in weights}


def _transformer_folder(path: Path) -> Path:
    """The folder that holds the weights. An official one's `transformer_ode/`, another model, is never looked into."""
    return path / "transformer" if os.path.isdir(path / "transformer") else path


def _weight_files(folder: Path) -> list[Path]:
    """The one safetensors file of a folder, or all the shards that its index names."""
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read ({error.strerror}). Check its permissions.") from error
    indices = [x for x in paths if x.name.endswith(".safetensors.index.json")]
    files = [x for x in paths if x.name.endswith(".safetensors")]
    usual = folder / "diffusion_pytorch_model.safetensors"
    if indices:
        return read_index(next((x for x in indices if x.stem == f"{usual.name}.index"), indices[0]))
    if usual in files or len(files) == 1:
        return [usual if usual in files else files[0]]
    if files:
        names = some([f.name for f in files])
        raise CheckpointError(f"{folder} holds several files ({names}) and no index of shards. Give one of the files.")
    if pickles := [x.name for x in paths if x.suffix.lower() in PICKLES]:
        raise CheckpointError(
            f"{folder} has its weights as pickles only ({some(pickles)}), and opening one can run any code in it. "
            "Download the .safetensors files."
        )
    raise CheckpointError(
        f"{folder} holds no .safetensors file. Give a folder of a Helios repository, such as Helios-Mid."
    )


def _refuse_foreign(path: Path, stored: Collection[str]) -> None:
    if not any(key.endswith(HISTORY_PATCHES) for key in stored):
        for pattern, looks_like in FOREIGN:
            if key := next((key for key in stored if re.search(pattern, key)), None):
                raise CheckpointError(f"{path} is no Helios model: {quoted(key)} is a key of {looks_like}.")
        raise CheckpointError(
            f"{path} is no Helios model: none of its {len(stored)} tensors is {' or '.join(HISTORY_PATCHES)}. "
            f"It begins with {some(list(stored))}. Give the transformer of a Helios repository."
        )
    if quantised := [key for key in stored if FOREIGN_QUANTISED.search(key)]:
        raise CheckpointError(
            f"{path} is quantised in a way that is not ComfyUI's ({some(quantised)}), and not supported. Use bf16 "
            "weights, or scaled fp8 ones made with scripts/convert_checkpoint.py --quant fp8_scaled."
        )


def _canonical(path: Path, stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Give the tensors the names that `HeliosTransformer` has for them."""
    prefix = next((p for p in PREFIXES if any(p + patch in stored for patch in HISTORY_PATCHES)), "")
    tensors: dict[str, StoredTensor] = {}
    for key, tensor in stored.items():
        if prefix == IN_CHECKPOINTS and not key.startswith(prefix):
            continue  # text encoder or VAE
        name = key.removeprefix(prefix)
        if "norm_added_q" in name:  # old exports carry this unused norm
            continue
        name = own_name(name)
        if name in tensors:
            first, published = tensors[name].key, published_name(name)
            raise CheckpointError(
                f"{path} holds {quoted(published)} twice, as {quoted(first)} and {quoted(key)}. Remove one."
            )
        tensors[name] = tensor
    return tensors


def _config(
    path: Path,
    folder: Path | None,
    metadata: Mapping[str, str],
    tensors: Mapping[str, StoredTensor],
    saved: StoredTensor | None,
) -> TransformerConfig:
    """From the folder's config.json, else from the file's metadata, else from the shapes.

    ComfyUI saves models without metadata: where shapes do not tell, `saved` is the tensor that has it as text.
    """
    source = f"what the shapes of the tensors in {path} tell"
    try:
        if folder is not None and os.path.exists(file := folder / "config.json"):
            source = str(file)
            values = read_json(file)
            if (model := values.get("_class_name", "HeliosTransformer3DModel")) != "HeliosTransformer3DModel":
                raise ValueError(f"it describes a {quoted(model)}")
        elif CONFIG_KEY in metadata:
            source = f"metadata {CONFIG_KEY!r} of {path}"
            values = parse_json(metadata[CONFIG_KEY].encode())
        elif saved is not None:
            source = f"{quoted(saved.key)} of {path}"
            values = read_text(path, saved)
        else:
            return _inferred_config(path, tensors)
        return TransformerConfig.from_dict(values)
    except CheckpointError:
        raise
    except ValueError as error:
        reason = str(error).rstrip(".")
        raise CheckpointError(
            f"{source} is not the configuration of a Helios transformer: {reason}. Download it again."
        ) from error


def _inferred_config(path: Path, tensors: Mapping[str, StoredTensor]) -> TransformerConfig:
    """The configuration that the shapes of the tensors show.

    For a missing tensor the published size stands in, so that `_check` gets to list what is missing.
    """
    usual = TransformerConfig()

    def size(name: str, axis: int, default: int) -> int:
        shape = tensors[name].shape if name in tensors else ()
        return (shape[axis] if axis < len(shape) else 0) or default

    width = size("patch_embedding.weight", 0, usual.inner_dim)
    if width % HEAD_DIM:
        raise CheckpointError(
            f"{path} has no configuration, and its width of {width} is no multiple of {HEAD_DIM}, the published size "
            "of a head. Give the folder with its config.json, or make a file of it with scripts/convert_checkpoint.py."
        )
    t, h, w = (size("patch_embedding.weight", 2 + i, usual.patch_size[i]) for i in range(3))
    key_scale = tensors.get("blocks.0.attn1.history_key_scale.weight")
    return TransformerConfig(
        patch_size=(t, h, w),
        num_attention_heads=width // HEAD_DIM,
        in_channels=size("patch_embedding.weight", 1, usual.in_channels),
        out_channels=size("proj_out.weight", 0, usual.out_channels * t * h * w) // (t * h * w),
        text_dim=size("condition_embedder.text_embedder.linear_1.weight", 1, usual.text_dim),
        freq_dim=size("condition_embedder.time_embedder.linear_1.weight", 1, usual.freq_dim),
        ffn_dim=size("blocks.0.ffn.net.0.proj.weight", 0, usual.ffn_dim),
        num_layers=len({found[1] for found in map(BLOCK.fullmatch, tensors) if found}) or usual.num_layers,
        cross_attn_norm=any(name.endswith(".norm2.weight") for name in tensors),
        is_amplify_history=key_scale is not None,
        history_scale_mode="scalar" if key_scale is not None and key_scale.shape == (1,) else "per_head",
    )


def _check(
    path: Path,
    config: TransformerConfig,
    tensors: Mapping[str, StoredTensor],
    quantised: Mapping[str, QuantisedLayer],
) -> None:
    # One block is built, without memory: how many there are said to be is not believed before they are seen.
    weights = HeliosTransformer(replace(config, num_layers=1), device="meta").state_dict()
    block = {found[2]: tuple(x.shape) for name, x in weights.items() if (found := BLOCK.fullmatch(name))}
    others = {name: tuple(x.shape) for name, x in weights.items() if not BLOCK.fullmatch(name)}

    def expected(name: str) -> tuple[int, ...] | None:
        if (found := BLOCK.fullmatch(name)) is None:
            return others.get(name)
        return block.get(found[2]) if int(found[1]) < config.num_layers else None

    unexpected = [tensor.key for name, tensor in tensors.items() if expected(name) is None]
    total = len(others) + config.num_layers * len(block)
    if (missing := total - len(tensors) + len(unexpected)) or unexpected:
        names = itertools.chain(others, (f"blocks.{i}.{name}" for i in range(config.num_layers) for name in block))
        lacking = list(itertools.islice((published_name(name) for name in names if name not in tensors), SHOWN))
        raise CheckpointError(
            f"{path} does not fit a Helios transformer of {config.num_layers} blocks: "
            f"{missing} of {total} tensors are missing{': ' if missing else ''}{some(lacking, missing)}; "
            f"{len(unexpected)} are unexpected{': ' if unexpected else ''}{some(unexpected)}. "
            "Take config.json and weights from the same repository, and all of them."
        )
    _check_quantised(path, tensors, {layer: (x, expected(f"{layer}.weight")) for layer, x in quantised.items()})
    tensors = {name: x for name, x in tensors.items() if name.removesuffix(".weight") not in quantised}
    if wrong := [f"{t.key} {t.shape} for {expected(k)}" for k, t in tensors.items() if t.shape != expected(k)]:
        raise CheckpointError(
            f"{path} has {len(wrong)} tensors of another shape than its configuration says: {some(wrong)}. "
            "Take config.json and weights from the same repository."
        )
    if unreadable := [t.key for t in tensors.values() if t.dtype not in DTYPES.values()]:
        raise CheckpointError(
            f"{path} stores {len(unreadable)} tensors in a type that is none of {some(DTYPES)}: {some(unreadable)}. "
            "Use bf16 weights, or scaled fp8 ones made with scripts/convert_checkpoint.py --quant fp8_scaled."
        )


def _check_quantised(
    path: Path,
    tensors: Mapping[str, StoredTensor],
    quantised: Mapping[str, tuple[QuantisedLayer, tuple[int, ...] | None]],
) -> None:
    """Raise CheckpointError for quantised layers that cannot be; quantised: each with the shape of its matrix."""
    wrong: list[str] = []
    for name, (layer, shape) in quantised.items():
        if shape is None or len(shape) != 2:
            raise CheckpointError(
                f"{path} says that {name} is quantised, which is no matrix of a Helios transformer. Download the file "
                "again, or convert it again."
            )
        if not name.startswith(IN_BLOCKS) and layer.format not in ONE_SCALE:
            raise CheckpointError(
                f"{path} has {name} in {layer.format}; outside of the blocks only {' and '.join(ONE_SCALE)} are "
                "supported. Leave it in bf16 where the file is made."
            )
        wrong += misfits(layer, tensors[f"{name}.weight"], shape)
    if wrong:
        raise CheckpointError(
            f"{path} has {len(wrong)} tensors of quantised layers that are missing or not as their format has them: "
            f"{some(wrong)}. Download the file again, or convert it again."
        )


def read_variant(path: Path, metadata: Mapping[str, str] | None = None) -> Variant | None:
    """Which variant a file's metadata or a repository's folder says it is; None where neither does."""
    metadata = metadata or {}
    if (variant := metadata.get(VARIANT_KEY)) is not None:
        if variant not in get_args(Variant):
            raise CheckpointError(
                f"{path} says in its metadata that it is {quoted(variant)}, which is none of "
                f"{some(get_args(Variant))}. Convert it again with scripts/convert_checkpoint.py."
            )
        return cast(Variant, variant)
    pipeline = read_json_if_there(path / "model_index.json")
    schedule = read_json_if_there(path / "scheduler" / "scheduler_config.json")
    if not pipeline and not schedule:
        return None
    if not isinstance(pipeline.get("is_distilled", False), bool):
        raise CheckpointError(
            f"{path / 'model_index.json'} has is_distilled {quoted(pipeline['is_distilled'])}, which is neither true "
            "nor false. Download it again."
        )
    if pipeline.get("is_distilled") or schedule.get("_class_name") == "HeliosDMDScheduler":
        return "distilled"
    if name := pipeline.get("_class_name"):
        return "mid" if name == "HeliosPyramidPipeline" else "base"
    return "mid" if schedule.get("stages") == 3 else "base"
