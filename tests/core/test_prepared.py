"""Prompts and histories that are prepared once, and operations that work in place: exactly the same numbers."""

import pytest
import torch

from comfyui_helios.helios_core.attention import sdpa
from comfyui_helios.helios_core.history import Memory
from comfyui_helios.helios_core.modulation import Modulation
from comfyui_helios.helios_core.rope import apply_rope_, rope_table
from comfyui_helios.helios_core.transformer import KEPT_ROPE_TABLES, HeliosTransformer
from harness import oracle
from support.videos import CASES, our_transformer, our_video

CONFIGS = {
    "tiny": {},
    "no cross-attention norm": {"cross_attn_norm": False},
    "history cross-attends": {"guidance_cross_attn": False},
    "history has the noisy timestep": {"zero_history_timestep": False},
    "amplified per head": {"is_amplify_history": True},
}


def network(dtype=torch.float32, **config):
    ours = our_transformer(oracle.transformer(0, **config))
    model = HeliosTransformer(ours.config, dtype=dtype)
    model.load_state_dict(ours.state_dict())
    return model.eval()


def inputs(batch=1, noisy=(6, 10), size=(12, 20), dtype=torch.float32):
    rng = torch.Generator().manual_seed(0)
    memory = Memory(torch.randn(batch, 16, 19, *size, generator=rng), torch.randn(batch, 16, 1, *size, generator=rng))
    past = memory.history()
    past = past.to(dtype)
    latents = torch.randn(batch, 16, 9, *noisy, generator=rng).to(dtype)
    return latents, torch.rand(batch, generator=rng) * 1000, oracle.prompts(batch=batch)[0].to(dtype), past


def tensors_of(prepared_text, past):
    pairs = [x for pair in prepared_text.keys_values for x in pair]
    return [prepared_text.tokens, *pairs, past.tokens, past.rope, past.modulation]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_prepared_inputs_change_nothing(config, dtype):
    ours = network(dtype, **config)
    latents, timestep, text, history = inputs(2, dtype=dtype)
    prompt, past = ours.prepare_text(text), ours.prepare_history(history)
    expected = ours(latents, timestep, text, history)
    for arguments in ((text, past), (prompt, history), (prompt, past), (prompt, past)):
        assert torch.equal(ours(latents, timestep, *arguments), expected)


@torch.no_grad()
def test_nothing_that_is_handed_in_is_written_to():
    ours = network()
    latents, timestep, text, history = inputs()
    prompt, past = ours.prepare_text(text), ours.prepare_history(history)
    given = [latents, timestep, text, history.long, history.mid, history.short, *tensors_of(prompt, past)]
    before = [x.clone() for x in given]
    ours(latents, timestep, text, history)
    ours(latents, timestep, prompt, past)
    assert all(torch.equal(x, copy) for x, copy in zip(given, before, strict=True))

    block, time = ours.blocks[0], ours.condition_embedder.time(timestep, torch.float32)[1]
    x = torch.randn(1, past.tokens.shape[1] + 5, 48)
    rope = torch.randn(2, x.shape[1], 12)
    copies = x.clone(), rope.clone(), time.clone()
    block(x, prompt.tokens, Modulation(time, time, past.tokens.shape[1]), rope, sdpa)
    assert all(torch.equal(a, b) for a, b in zip((x, rope, time), copies, strict=True))


@torch.no_grad()
def test_prepared_text_counts_its_bytes():
    ours = network()
    prompt = ours.prepare_text(oracle.prompts(batch=3)[0])
    assert prompt.nbytes == 3 * 12 * 48 * (2 * 2 + 1) * 4  # batch, tokens, width, (keys and values of 2 blocks, tokens)


@torch.no_grad()
@pytest.mark.parametrize("name", ["distilled 2, 2, 2 amplified", "mid", "base unipc guided"])
def test_whole_runs_are_the_same(name):
    """A run as a host makes it, prompts prepared once and histories once a chunk, against every step on its own."""
    case, ours = CASES[name], network()
    positive, negative = oracle.prompts()

    def binder(texts, prepare_history):
        def bind(index, history):
            past = prepare_history(history)

            def predict(latents, timestep, sigma):
                flows = [ours(latents, torch.full((1,), timestep), text, past) for text in texts]
                return case.schedule.guide(*flows) if case.schedule.guided else flows[0]

            return predict

        return bind

    prepared = binder([ours.prepare_text(text) for text in (positive, negative)], ours.prepare_history)
    assert torch.equal(our_video(case, prepared), our_video(case, binder([positive, negative], lambda h: h)))


@torch.no_grad()
def test_the_last_block_leaves_out_what_nobody_reads():
    """Without the history's queries the noisy tokens come out as they do with them."""
    ours = network()
    latents, timestep, text, history = inputs(noisy=(12, 20))
    shapes = []

    def run_block(i, block, x, text, time, rope, noisy_only):
        result = block(x, text, time, rope, sdpa, noisy_only)
        shapes.append((x.shape[1], result.shape[1]))
        whole = block(x, text, time, rope, sdpa)
        torch.testing.assert_close(result, whole[:, -result.shape[1] :], rtol=1e-5, atol=1e-5)
        return whole  # a host's patch may return all tokens of the last block

    result = ours(latents, timestep, text, history, run_block=run_block)
    torch.testing.assert_close(result, ours(latents, timestep, text, history), rtol=1e-5, atol=1e-5)
    noisy = 9 * 6 * 10
    (whole, kept), (again, last) = shapes
    assert whole == kept == again > noisy == last


def test_rope_tables_are_kept_for_every_mode():
    ours = network()
    asked = ((0, 3, 5), (3, 4, 6), 2, torch.device("cpu"))
    with torch.inference_mode():
        table = ours.rope(*asked)
    assert ours.rope(*asked) is table
    assert not table.is_inference()
    assert torch.equal(table, rope_table((0, 3, 5), 4, 6, (8, 8, 8), 1e4, 2))
    assert not torch.equal(ours.rope((0, 3, 6), *asked[1:]), table)


def test_rope_tables_of_many_sizes_do_not_pile_up():
    ours = network()
    for width in range(1, 100):
        ours.rope((0, 1), (2, 1, width), 1, torch.device("cpu"))
    assert len(ours._rope_tables) == KEPT_ROPE_TABLES


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotating_complex_numbers_is_rotating_pairs(monkeypatch, dtype):
    """Both ways of `apply_rope_`, to the last bit."""
    x = torch.randn(2, 18, 3, 24).to(dtype)
    table = rope_table((0, 3, 5), 2, 3, (8, 8, 8), 1e4)
    results = []
    for devices in (("cpu",), ()):
        monkeypatch.setattr("comfyui_helios.helios_core.rope.COMPLEX", devices)
        results.append(apply_rope_(x.clone(), table))
    assert torch.equal(*results)
    assert not torch.equal(results[0], x)
