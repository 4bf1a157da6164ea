"""What cannot be sampled is refused, before the host is asked to load anything."""

from types import SimpleNamespace

import comfy.model_management
import pytest
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingSD3
from comfy_extras.nodes_wan import WanImageToVideo

from comfyui_helios.helios_core.history import Memory
from comfyui_helios.helios_core.schedule import BASE, MID
from comfyui_helios.helios_core.video import VideoStart
from comfyui_helios.host.model.loading import load_model
from comfyui_helios.host.sockets.conditioning import set_history
from comfyui_helios.nodes.sample import HeliosChunkedSampler
from harness import oracle
from support.runs import QUICK, conditioning, make_distilled, run_node, sample


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(str(make_distilled(tmp_path_factory.mktemp("models") / "Helios-Distilled")), "fp32")


@pytest.fixture
def nothing_loads(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("models were loaded")

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", fail)


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize(
    ("schedule", "size", "works"),
    [
        (QUICK, (80, 64), "works is 64x64"),
        (MID, (128, 80), "works is 64x128"),
        (BASE, (72, 64), "works with every schedule is 64x64"),
    ],
)
def test_refuses_a_size_the_variant_cannot_make(model, schedule, size, works):
    with pytest.raises(ValueError, match=f"nearest that {works}"):
        sample(model, schedule, size)


@pytest.mark.usefixtures("nothing_loads")
def test_refuses_a_history_of_another_size(model):
    seed = VideoStart(source=Memory.empty(1, 16, 16))
    latent = {"samples": torch.zeros(1, 16, 9, 8, 8)}
    prompts = [set_history(conditioning(p), seed) for p in oracle.prompts()]
    with pytest.raises(ValueError, match="history is 128x128.*video is 64x64"):
        run_node(HeliosChunkedSampler, model, *prompts, latent, QUICK, 0)


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ((1, 4, 64, 64), r"\(1, 4, 64, 64\).*Helios History Injection"),
        ((1, 16, 10, 8, 8), "multiple of 9"),
        ((1, 16, 0, 8, 8), "multiple of 9"),
    ],
)
def test_refuses_a_latent_of_another_kind(model, samples, message):
    with pytest.raises(ValueError, match=message):
        run_node(
            HeliosChunkedSampler,
            model,
            *map(conditioning, oracle.prompts()),
            {"samples": torch.zeros(samples)},
            QUICK,
            0,
        )


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize("key", ["area", "mask", "control"])
def test_refuses_conditioning_it_would_ignore(model, key):
    with pytest.raises(ValueError, match="does not support"):
        sample(model, QUICK, positive=conditioning(oracle.prompts()[0], **{key: object()}))


@pytest.mark.usefixtures("nothing_loads")
def test_refuses_the_picture_of_a_node_for_wan(model):
    """Which would make a text-to-video of it, without a word."""
    prompts = map(conditioning, oracle.prompts())
    image = torch.rand(1, 64, 64, 3)
    vae = SimpleNamespace(encode=lambda frames: torch.zeros(1, 16, 9, 8, 8))
    positive, *_ = WanImageToVideo.execute(*prompts, vae, 64, 64, 33, 1, start_image=image).result
    with pytest.raises(ValueError, match="WanImageToVideo.*start_image.*Helios History Injection"):
        sample(model, QUICK, positive=positive)


@pytest.mark.usefixtures("nothing_loads")
def test_refuses_another_text_encoder(model):
    with pytest.raises(ValueError, match="77.*the model expects 32|768 wide, the model expects 32"):
        sample(model, QUICK, positive=conditioning(torch.zeros(1, 77, 768)))


@pytest.mark.usefixtures("nothing_loads")
def test_refuses_a_replaced_model_sampling(model):
    [patched] = ModelSamplingSD3().patch(model, 3.0)
    with pytest.raises(ValueError, match=r"went through ModelSamplingSD3 \(nodes_model_advanced\), which replaces"):
        sample(patched, QUICK)


@pytest.mark.usefixtures("nothing_loads")
def test_refuses_another_model(model):
    other = SimpleNamespace(model=torch.nn.Module())
    with pytest.raises(ValueError, match="needs a Helios model"):
        sample(other, QUICK)


def test_ksampler_is_told_what_to_use_instead(model):
    import comfy.sample

    with pytest.raises(ValueError, match="Helios Chunked Sampler"):
        comfy.sample.sample(
            model,
            torch.randn(1, 16, 9, 8, 8),
            1,
            1.0,
            "euler",
            "simple",
            conditioning(oracle.prompts()[0]),
            conditioning(oracle.prompts()[1]),
            torch.zeros(1, 16, 9, 8, 8),
        )
