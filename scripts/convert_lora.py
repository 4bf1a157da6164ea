"""Make one LoRA file for every loader of what Helios' training wrote: its alpha and its whole weights with it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))  # where the Python of ComfyUI's portable build does not look
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from output_file import check_target, replacing, run

from helios_core.checkpoint import PREFIXES, Checkpoint, open_checkpoint, own_name, published_name
from helios_core.config import TransformerConfig
from helios_core.lora_file import by_weight, metadata_alphas
from helios_core.quoting import some
from helios_core.regular_file import CheckpointError
from helios_core.safetensors_file import PICKLES, StoredTensor, read_headers, read_tensors
from helios_core.transformer import HeliosTransformer

PREFIX = "diffusion_model."  # that hosts know


def convert(sources: Sequence[Path], target: Path, *, base: Path | None = None, force: bool = False) -> str:
    """Write what is in the sources to the file `target` and say in a line what it was.

    `target` appears when it is complete, and never on an error (CheckpointError, OSError). Whole weights become
    differences to the model `base`, or without it replace those of whatever model they are loaded on.
    """
    check_target(target, force)
    model = None if base is None else open_checkpoint(base)
    if model and model.quantised:
        raise CheckpointError(f"{base} is quantised. Give the model that was trained, in bf16 or fp32, as --base.")
    made: dict[str, Tensor] = {}
    unknown: list[str] = []
    for source in sources:
        tensors, not_known = converted(source, model)
        if twice := sorted(made.keys() & tensors.keys()):
            raise CheckpointError(f"{source} and another source hold {some(twice)} both. Leave one of them out.")
        made |= tensors
        unknown += not_known
    if not made:
        raise CheckpointError(f"Nothing in {some(sources)} is of a Helios LoRA: {some(unknown)}.")
    with replacing(target) as partial:
        partial.write_bytes(save(made, {"format": "pt"}))  # save_file makes a file that its owner alone can read
    return said(target, made, unknown)


def converted(source: Path, model: Checkpoint | None) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a source by the names that hosts know, and the keys of those that Helios does not have."""
    if source.suffix.lower() in PICKLES:
        raise CheckpointError(
            f"{source} is a pickle, and opening one can run any code in it. Where you trust it, make a safetensors "
            "file of it first: `safetensors.torch.save_file(torch.load(path, weights_only=True), target)`."
        )
    stored, metadata = read_headers([source])
    weights = every_weight() if model is None else model.tensors
    changes, rest = by_weight(source, stored, weights)
    whole, unknown = whole_weights(rest, stored, weights)
    parts = {
        f"{PREFIX}{module_of(weight)}.{part}": tensor
        for weight, tensors in changes.items()
        for part, tensor in tensors.items()
    }
    made = {name: tensor.clone() for name, tensor in read_tensors(parts)}
    for weight, alpha in metadata_alphas(source, metadata, changes).items():
        made[f"{PREFIX}{module_of(weight)}.alpha"] = torch.tensor(alpha)
    return made | dict(in_place_of(whole, model)), unknown


def every_weight() -> Mapping[str, object]:
    """Every name that a Helios of the published size may have."""
    return HeliosTransformer(TransformerConfig(is_amplify_history=True), device="meta").state_dict()


def whole_weights(
    keys: Sequence[str], stored: Mapping[str, StoredTensor], weights: Mapping[str, object]
) -> tuple[dict[str, StoredTensor], list[str]]:
    """Those of the keys that are a model's own tensors, by name, and the others."""
    whole, unknown = {}, []
    for key in keys:
        prefix = next((prefix for prefix in PREFIXES if key.startswith(prefix)), "")
        if (name := own_name(key.removeprefix(prefix))) in weights:
            whole[name] = stored[key]
        else:
            unknown.append(key)
    return whole, unknown


def in_place_of(whole: Mapping[str, StoredTensor], model: Checkpoint | None) -> Iterator[tuple[str, Tensor]]:
    """Whole weights as a LoRA file has them: as differences to the model's, or as they are."""
    for name, tensor in read_tensors(whole, lambda name: torch.float32):
        if model is None:
            yield f"{PREFIX}{module_of(name)}.set_weight", tensor.clone()
            continue
        own = model.tensors[name]
        if own.shape != whole[name].shape:
            raise CheckpointError(
                f"{whole[name].file} has {whole[name].key} in the shape {whole[name].shape}, {model.path} in "
                f"{own.shape}. Give the model that was trained as --base."
            )
        [(_, weight)] = read_tensors({name: own}, lambda name: torch.float32)
        bias = name.endswith(".bias")
        yield f"{PREFIX}{module_of(name).removesuffix('.bias')}.diff{'_b' if bias else ''}", tensor - weight


def module_of(weight: str) -> str:
    """The module of a weight, as files call it; a bias keeps its name."""
    return published_name(weight).removesuffix(".weight")


def said(target: Path, made: Mapping[str, Tensor], unknown: Sequence[str]) -> str:
    def count(*endings: str) -> int:
        return sum(name.endswith(endings) for name in made)

    parts = [f"{count('.lora_down.weight')} modules with a LoRA, {count('.alpha')} of them with alpha"]
    if differences := count(".diff", ".diff_b"):
        parts.append(f"{differences} differences of whole weights")
    if whole := count(".set_weight"):
        parts.append(f"{whole} whole weights, which take effect at any strength (give --base for differences)")
    if unknown:
        parts.append(f"{len(unknown)} tensors left out, which Helios does not have: {some(unknown)}")
    return f"{target}: {'; '.join(parts)}"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Turn what Helios' training wrote into one LoRA file for ComfyUI. ComfyUI's own loaders do not see "
        "alpha, which stands in the file's metadata, nor whole weights (norms, patch_short, patch_mid, patch_long, "
        "history_key_scale).",
        epilog="example: python scripts/convert_lora.py pytorch_lora_weights.safetensors "
        "ComfyUI/models/loras/mine.safetensors --base ComfyUI/models/diffusers/Helios-Base",
    )
    parser.add_argument("sources", type=Path, nargs="+", help=".safetensors files of one training; a .pth is refused")
    parser.add_argument("target", type=Path, help="the .safetensors file to make; put it into models/loras")
    parser.add_argument(
        "--base",
        type=Path,
        help="the model that was trained, a folder or file: whole weights become differences to it, which a loader's "
        "strength scales. Without it they replace the model's weights, at any strength but 0",
    )
    parser.add_argument("--force", action="store_true", help="overwrite the target if it exists")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return run(lambda: convert(args.sources, args.target, base=args.base, force=args.force))


if __name__ == "__main__":
    raise SystemExit(main())
