"""The model of the time: its FLOPs are those that torch counts, and its table in the documents is its own."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from comfyui_helios.helios_core.config import TransformerConfig
from comfyui_helios.helios_core.history import Memory
from comfyui_helios.helios_core.transformer import HeliosTransformer

ROOT = Path(__file__).resolve().parents[2]
OF_DIFFUSERS = (69.7, 119.1, 359.6)  # TFLOP of a forward of each stage, as counted
OF_DECODING = 69.3
SMALL = {"num_attention_heads": 2, "attention_head_dim": 24, "rope_dim": (8, 8, 8), "num_layers": 3, "ffn_dim": 80}


@pytest.fixture
def roofline(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import roofline

    return roofline


def counted(network, size, stage):
    """FLOPs of a forward, and of a step with prompt and history prepared, on the meta device."""
    with torch.inference_mode(), torch.device("meta"):
        history = Memory(torch.randn(1, 16, 19, *size), torch.randn(1, 16, 1, *size)).history().to(network.dtype)
        text = torch.randn(1, 512, network.config.text_dim, dtype=network.dtype)
        latents = torch.randn(1, 16, 9, *(side // 2 ** (2 - stage) for side in size), dtype=network.dtype)
        with FlopCounterMode(display=False) as whole:
            network(latents, torch.tensor([500.0]), text, history)
        prepared = network.prepare_text(text), network.prepare_history(history)
        with FlopCounterMode(display=False) as step:
            network(latents, torch.tensor([500.0]), *prepared)
    return whole.get_total_flops(), step.get_total_flops()


@pytest.mark.parametrize(("config", "size"), [({"num_layers": 4}, (48, 80)), (SMALL, (24, 40))], ids=["14b", "small"])
def test_the_network_takes_the_counted_flops(roofline, config, size):
    config = TransformerConfig(**config)
    network = HeliosTransformer(config, dtype=torch.bfloat16, device="meta")
    for stage in range(3):
        model = [list(each(config, size, stage)) for each in (roofline.forward, roofline.step)]
        assert tuple(map(roofline.count_flops, model)) == counted(network, size, stage)


@pytest.mark.parametrize("stage", range(3))
def test_diffusers_takes_the_flops_of_before(roofline, stage):
    model = roofline.count_flops(roofline.forward(roofline.CONFIG, roofline.NATIVE, stage, whole_last_block=True))
    assert model / 1e12 == pytest.approx(OF_DIFFUSERS[stage], rel=1e-3)


@pytest.mark.parametrize(("size", "dim"), [((48, 80), 96), ((8, 16), 8)], ids=["real", "small"])
def test_decoding_takes_the_counted_flops(roofline, size, dim):
    from diffusers import AutoencoderKLWan

    with torch.inference_mode(), torch.device("meta"), FlopCounterMode(display=False) as counter:
        AutoencoderKLWan(base_dim=dim, z_dim=16).decode(torch.randn(1, 16, 9, *size))
    model = roofline.count_flops(roofline.decoding(size, dim))
    assert model == counter.get_total_flops()
    if dim == 96:
        assert model / 1e12 == pytest.approx(OF_DECODING, rel=1e-3)


@pytest.mark.parametrize("name", ["BF16", "FP8_SCALED", "INT8", "W4A8"])
def test_weights_that_travel_are_the_blocks_matrices(roofline, name):
    import fits

    weights = getattr(roofline, name)
    matrices = [each for each in fits.network(fits.FORMATS[weights.name]).blocks.parameters() if each.ndim == 2]
    # What rows have, a scale each, is not counted.
    assert weights.block_bytes(roofline.CONFIG) == pytest.approx(sum(each.nbytes for each in matrices), rel=1e-3)


def test_of_int8_the_quantised_share_is_multiplied_at_its_rate(roofline):
    before = list(roofline.step(roofline.CONFIG, roofline.NATIVE, 2))
    after = list(roofline.in_int8(before, share=0.75, value=1))
    products = sum(each.flops for each in before if each.kind == roofline.PRODUCTS and each.shape[0] > 1)
    assert sum(each.flops for each in after if each.int8) == pytest.approx(0.75 * products)
    rotating = roofline.count_flops(after) - roofline.count_flops(before)
    assert 0.02 * products < rotating < 0.05 * products
    twice = roofline.Card("", 100, 200, 10, 10, 100)
    times = [roofline.chunk_seconds(twice, (1, 1, 1), each) for each in (roofline.BF16, roofline.INT8)]
    assert 0.6 < times[1] / times[0] < 0.9  # attention stays as it is


def test_a_byte_a_value_travels_sooner_but_has_to_be_decoded(roofline):
    bf16, fp8 = roofline.BF16, roofline.FP8_SCALED
    slow_bus, slow_memory = roofline.Card("", 1000, 1000, 100, 1, 12), roofline.Card("", 100, 100, 1, 1, 100)
    for card, quicker in ((slow_bus, fp8), (slow_memory, bf16)):
        assert min((bf16, fp8), key=lambda weights: roofline.chunk_seconds(card, (1, 1, 1), weights)) is quicker


def test_a_slow_bus_is_waited_for(roofline):
    resident = roofline.Card("", 100, 100, 1, 10, 100)
    offloaded = roofline.Card("", 100, 100, 1, 10, 20)
    slow = roofline.Card("", 100, 100, 1, 1, 20)
    times = [roofline.chunk_seconds(card, (1, 1, 1)) for card in (resident, offloaded, slow)]
    assert times == sorted(times)
    assert times[2] == pytest.approx(3 * roofline.BF16.block_bytes(roofline.CONFIG) / 1e9, rel=0.01)


def test_the_table_is_that_of_the_program(roofline):
    assert roofline.FILE.read_text(encoding="utf-8") == roofline.document()
