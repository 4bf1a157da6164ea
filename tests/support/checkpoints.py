"""Checkpoint files of random weights: what is read, refused and converted in tests."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from comfyui_helios.helios_core.checkpoint import published_name
from comfyui_helios.helios_core.config import TransformerConfig
from comfyui_helios.helios_core.transformer import HeliosTransformer

SMALL = TransformerConfig(num_attention_heads=1, text_dim=32, freq_dim=32, ffn_dim=64, num_layers=2)
ODD_HEADS = TransformerConfig(
    num_attention_heads=2, attention_head_dim=24, text_dim=32, freq_dim=32, ffn_dim=64, num_layers=2, rope_dim=(8, 8, 8)
)
REPACK = {  # parts of names in the single file made for ComfyUI
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    ".ffn.net.0.proj": ".ffn.0",
    ".ffn.net.2": ".ffn.2",
}


def make_weights(config: TransformerConfig = SMALL, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random weights under the names of files."""
    rng = torch.Generator().manual_seed(0)
    weights = HeliosTransformer(config, device="meta").state_dict()
    return {published_name(name): torch.randn(x.shape, generator=rng).to(dtype) for name, x in weights.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit for bit, dtypes and names included. (torch.equal knows no float8.)"""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name].float(), tensor.float()), name


def write_json(file: Path, values: object) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(values))


def make_official_shards(folder: Path) -> None:
    """As diffusers writes an official folder, in shards, with a transformer_ode/ that must not be opened."""
    from diffusers import HeliosTransformer3DModel

    torch.manual_seed(0)
    model = HeliosTransformer3DModel(**ODD_HEADS.to_dict())
    model.save_pretrained(folder / "transformer", max_shard_size="400KB")
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 2
    (folder / "transformer_ode").mkdir()
    (folder / "transformer_ode" / "config.json").write_text("not JSON")
    (folder / "transformer_ode" / "diffusion_pytorch_model.safetensors").write_bytes(b"not safetensors")
    write_json(folder / "model_index.json", {"_class_name": "HeliosPyramidPipeline", "is_distilled": True})
    save_file(dict(model.state_dict()), folder / "expected.safetensors.keep")
