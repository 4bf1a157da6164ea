"""The transformer against diffusers', and its published size."""

import math

import pytest
import torch

from comfyui_helios.helios_core.config import CHUNK_LATENTS, TransformerConfig
from comfyui_helios.helios_core.history import HistoryLayout, Memory
from comfyui_helios.helios_core.transformer import LONG_POOL, MID_POOL, HeliosTransformer
from harness import oracle
from harness.errors import difference

CASES = {
    "tiny": {},
    "wide": {"num_attention_heads": 3, "attention_head_dim": 32, "rope_dim": (12, 10, 10), "ffn_dim": 100},
    "deep": {"num_layers": 5},
    "no cross-attention norm": {"cross_attn_norm": False},
    "history cross-attends": {"guidance_cross_attn": False},
    "history has the noisy timestep": {"zero_history_timestep": False},
    "amplified per head": {"is_amplify_history": True},
    "amplified by a scalar": {"is_amplify_history": True, "history_scale_mode": "scalar"},
}


def pair(seed=0, **config):
    reference = oracle.transformer(seed, **config)
    ours = HeliosTransformer(TransformerConfig(**{**oracle.TINY, **config}))
    ours.load_state_dict(oracle.weights(reference))
    return reference, ours.eval()


def inputs(seed, batch, layout, size, noisy):
    """Random latents, timesteps, text and history: (B, 16, 9, *noisy) beside a history of (H, W) = size."""
    rng = torch.Generator().manual_seed(seed)
    past = torch.randn(batch, 16, layout.frames, *size, generator=rng)
    anchor = torch.randn(batch, 16, 1, *size, generator=rng)
    latents = torch.randn(batch, 16, CHUNK_LATENTS, *noisy, generator=rng)
    timestep = torch.rand(batch, generator=rng) * 1000
    return latents, timestep, oracle.prompts(seed, batch)[0], Memory(past, anchor, layout).history()


@torch.no_grad()
@pytest.mark.parametrize("config", CASES.values(), ids=CASES.keys())
def test_equals_the_reference(config):
    reference, ours = pair(**config)
    args = inputs(0, 1, HistoryLayout(), (12, 20), (6, 10))
    assert difference(ours(*args), oracle.ask(reference, *args)) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("anchor", [True, False])
@pytest.mark.parametrize(
    ("sizes", "size", "noisy"),
    [((16, 2, 1), (8, 16), (8, 16)), ((16, 2, 1), (12, 20), (4, 6)), ((5, 3, 2), (6, 14), (6, 14))],
    ids=["full resolution", "lower pyramid level", "odd history"],
)
def test_equals_the_reference_in_batches(seed, anchor, sizes, size, noisy):
    reference, ours = pair(seed)
    args = inputs(seed, 2, HistoryLayout(sizes, keep_first_frame=anchor), size, noisy)
    assert difference(ours(*args), oracle.ask(reference, *args)) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("noisy", [(3, 5), (6, 10), (12, 20)], ids=["stage 0", "stage 1", "stage 2"])
def test_bf16_error_is_no_larger_than_the_references(noisy):
    """Mean square over several seeds, each against its own float32 result."""
    errors = {"ours": 0.0, "reference": 0.0}
    for seed in range(4):
        reference, ours = pair(seed)
        latents, timestep, text, history = inputs(seed, 1, HistoryLayout(), (24, 40), (noisy[0] * 2, noisy[1] * 2))
        exact = ours(latents, timestep, text, history)

        half = HeliosTransformer(ours.config, dtype=torch.bfloat16)
        half.load_state_dict(ours.state_dict())
        # The reference casts by module name when it loads; cast alike here.
        for name, parameter in reference.named_parameters():
            islands = ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3", "history_key_scale")
            if not any(island in name for island in islands):
                parameter.data = parameter.data.bfloat16()
        low = [x.bfloat16() for x in (latents, text, history.long, history.mid, history.short)]
        past = type(history)(*low[2:], history.indices)
        for name, result in (
            ("ours", half(low[0], timestep, low[1], past)),
            ("reference", oracle.ask(reference, low[0], timestep, low[1], past)),
        ):
            errors[name] += (result.float() - exact).square().mean().item()
    assert 0 < math.sqrt(errors["ours"]) <= 1.1 * math.sqrt(errors["reference"])


@torch.no_grad()
def test_published_size():
    with torch.device("meta"):
        model = HeliosTransformer(TransformerConfig(), dtype=torch.bfloat16)
        weights = model.state_dict()
        assert sum(w.numel() for w in weights.values()) == 14_312_427_584
        assert len(weights) == 1101
        history = Memory.empty(1, 48, 80).history()
        tokens, rope = model.embed_history(
            type(history)(history.long.bfloat16(), history.mid.bfloat16(), history.short.bfloat16(), history.indices)
        )
    assert tokens.shape == (1, 2400, 5120)
    assert rope.shape == (2, 2400, 64)
    for stage, count in ((4, 540), (2, 2160), (1, 8640)):
        assert math.prod(model.token_grid(torch.empty(1, 16, 9, 48 // stage, 80 // stage))) == count


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 16), (6, 10), (48, 80)])
def test_tokens_are_counted_as_they_are_made(size):
    with torch.device("meta"):
        model = HeliosTransformer(TransformerConfig(num_layers=1))
        history = Memory.empty(1, *size).history()
        tokens, _ = model.embed_history(history)
    parts = ((history.long, LONG_POOL), (history.mid, MID_POOL), (history.short, 1))
    assert sum(model.count_tokens(part.shape, pool) for part, pool in parts) == tokens.shape[1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_layers": "2"}, "num_layers must be a whole number from 1 to 65536, got '2'"),
        ({"num_layers": None}, "num_layers"),
        ({"ffn_dim": 0}, "ffn_dim"),
        ({"patch_size": [1, 2]}, "patch_size must be three whole numbers"),
        ({"patch_size": [1, 4, 4]}, r"patch_size is \(1, 4, 4\).*has \(1, 2, 2\)"),
        ({"patch_size": [2, 2, 2]}, "patch_size"),
        ({"in_channels": 48}, "in_channels is 48.*has 16"),
        ({"out_channels": 32}, "out_channels"),
        ({"freq_dim": 31}, "freq_dim must be even.*got 31"),
        ({"eps": "x"}, "eps must be a number"),
        ({"rope_dim": [44, 42, 40]}, "add up to"),
    ],
)
def test_configs_that_cannot_be_built_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig.from_dict(values)


def test_needs_no_host():
    """The core runs where ComfyUI is not; in a process of its own, since this one has aliases for the tests."""
    import subprocess
    import sys
    from pathlib import Path

    code = (
        "import sys, pathlib, importlib\n"
        "for f in sorted(pathlib.Path('helios_core').glob('*.py')): importlib.import_module(f'helios_core.{f.stem}')\n"
        "assert not [m for m in sys.modules if m.split('.')[0] in ('comfy', 'nodes', 'folder_paths')]"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)
