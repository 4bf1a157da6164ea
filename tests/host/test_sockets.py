"""What a node of ours is given, over links or typed in, is looked at in one place per kind, before any work."""

import asyncio
import inspect
import math
from types import SimpleNamespace

import pytest
import torch
from comfy_api.latest import InputImpl, Types, io

from comfyui_helios.host.sockets.decoding import decode_chunk
from comfyui_helios.host.sockets.vae import check_vae
from comfyui_helios.nodes import HeliosExtension
from comfyui_helios.nodes.compile import HeliosCompile
from comfyui_helios.nodes.decode import HeliosChunkedVAEDecode
from comfyui_helios.nodes.history import HeliosHistoryInjection
from comfyui_helios.nodes.prompts import HeliosPromptSchedule
from comfyui_helios.nodes.sample import HeliosChunkedSampler
from comfyui_helios.nodes.schedule import HeliosAntiDrift
from comfyui_helios.nodes.text import HeliosTextEncode
from harness import oracle
from support.runs import QUICK, conditioning, run_node
from support.streams import make_parts

NAN = float("nan")
NO_TEXTS = (3, ["a"], {"a": 1})
HISTORY = "HeliosHistoryInjection"
NODES = {node.GET_SCHEMA().node_id: node for node in asyncio.run(HeliosExtension().get_node_list())}
NUMBERS = [
    (node, widget.id)
    for node, cls in NODES.items()
    for widget in cls.define_schema().inputs
    if isinstance(widget, (io.Int.Input, io.Float.Input))
]
TEXTS = [
    (node, widget.id)
    for node, cls in NODES.items()
    for widget in cls.define_schema().inputs
    if isinstance(widget, (io.String.Input, io.Combo.Input))
]

CHOICES = [
    (node, widget.id)
    for node, cls in NODES.items()
    for widget in cls.define_schema().inputs
    if isinstance(widget, io.Combo.Input) and widget.id not in ("file", "folder", "model_name", "lora_name")
]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return make_parts(tmp_path_factory.mktemp("models") / "Helios-Distilled")


def with_widget(node, name, value):
    """Run a node with nothing on its sockets and this in one of its widgets."""
    inputs = NODES[node].define_schema().inputs
    values = {widget.id: getattr(widget, "default", None) for widget in inputs}
    for widget in inputs:
        if isinstance(widget, io.Combo.Input):
            values[widget.id] = widget.default or "x"
    run_node(NODES[node], **{**values, name: value})


@pytest.mark.parametrize(
    ("node", "name", "value"),
    [
        *((*widget, value) for widget in NUMBERS for value in (NAN, -1e9)),
        *(
            (HISTORY, name, value)
            for name in ("width", "image_sigma_min")
            for value in (math.inf, 10**400, "3", None, [3])
        ),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_number_that_its_widget_could_not_have_is_refused(node, name, value):
    with pytest.raises(ValueError, match=rf"^`{name}` is .*; expected a (whole )?number from .*\. Correct the widget"):
        with_widget(node, name, value)


def test_true_is_no_seed():
    with pytest.raises(ValueError, match="^`seed` is True; expected a whole number"):
        with_widget("HeliosChunkedSampler", "seed", True)


def test_a_lone_surrogate_is_no_text():
    with pytest.raises(ValueError, match=r"^`negative` is '\\ud800'; expected text that can be written as UTF-8"):
        with_widget("HeliosTextEncode", "negative", "\ud800")


@pytest.mark.parametrize(
    ("node", "name", "value"),
    [
        *((*widget, None) for widget in TEXTS),
        *((*widget, value) for widget in ((HISTORY, "fit"), ("HeliosTextEncode", "positive")) for value in NO_TEXTS),
    ],
    ids=str,
)
def test_what_is_no_text_is_refused(node, name, value):
    with pytest.raises(ValueError, match=rf"^`{name}` is .*; expected (one of its choices|text that can be written)"):
        with_widget(node, name, value)


@pytest.mark.parametrize("node, name", CHOICES)
def test_a_choice_that_its_widget_does_not_have_is_refused(node, name):
    with pytest.raises(ValueError, match=rf"^{name} must be one of \w+, .*, got 'none of them'\.$"):
        with_widget(node, name, "none of them")


def test_the_host_still_finds_the_inputs_of_a_checked_node():
    assert list(inspect.signature(NODES["HeliosChunkedVAEDecode"].execute).parameters)[:3] == ["latent", "vae", "trim"]


LATENTS = {
    "nothing": (None, "no LATENT"),
    "no samples": ({"noise_mask": torch.zeros(1)}, "no LATENT"),
    "samples that are a list": ({"samples": [torch.zeros(1, 16, 9, 8, 8)]}, "no LATENT"),
    "nested samples": ({"samples": torch.nested.nested_tensor([torch.zeros(16, 9, 8, 8)])}, "no LATENT"),
    "sparse samples": ({"samples": torch.zeros(1, 16, 9, 8, 8).to_sparse()}, "no LATENT"),
    "samples without numbers": ({"samples": torch.zeros(1, 16, 9, 8, 8, device="meta")}, "no LATENT"),
    "a single number": ({"samples": torch.tensor(1.0)}, r"shape \(\)"),
    "an image's": ({"samples": torch.zeros(1, 16, 8, 8)}, r"shape \(1, 16, 8, 8\); expected \(batch, 16,"),
    "Wan 2.2's": ({"samples": torch.zeros(1, 48, 9, 8, 8)}, r"shape \(1, 48, 9, 8, 8\)"),
    "no frames": ({"samples": torch.zeros(1, 16, 0, 8, 8)}, r"shape \(1, 16, 0, 8, 8\)"),
    "whole numbers": ({"samples": torch.zeros(1, 16, 9, 8, 8, dtype=torch.int64)}, "holds torch.int64"),
    "8 bit": ({"samples": torch.zeros(1, 16, 9, 8, 8).to(torch.float8_e4m3fn)}, "holds torch.float8_e4m3fn"),
}
SPOILT = torch.zeros(1, 16, 9, 8, 8)
SPOILT[0, 3, 2, 1, 0] = NAN


def sampled_from(parts, latent):
    positive, negative = map(conditioning, oracle.prompts())
    run_node(HeliosChunkedSampler, parts.model, positive, negative, latent, QUICK, 3)


def decoded(parts, latent):
    run_node(HeliosChunkedVAEDecode, latent, parts.vae, False)


def history(positive=None, negative=None, width=64, height=64, **sources):
    prompts = [conditioning(prompt) for prompt in oracle.prompts()]
    given = [prompts[0] if positive is None else positive, prompts[1] if negative is None else negative]
    run_node(HeliosHistoryInjection, *given, width=width, height=height, frames=33, batch_size=1, **sources)


def gone_on_from(parts, latent):
    history(previous={} if latent is None else latent)


@pytest.mark.parametrize("run, socket", [(sampled_from, "latent"), (decoded, "latent"), (gone_on_from, "previous")])
@pytest.mark.parametrize("kind", LATENTS)
def test_what_is_no_latent_of_a_video_is_refused_by_its_sockets_name(parts, run, socket, kind):
    latent, message = LATENTS[kind]
    with pytest.raises(ValueError, match=f"`{socket}`.* {message}"):
        run(parts, latent)


@pytest.mark.parametrize("run, socket", [(decoded, "latent"), (gone_on_from, "previous")])
def test_latents_that_are_not_finite_are_refused_where_their_values_count(parts, run, socket):
    with pytest.raises(ValueError, match=f"LATENT on `{socket}` holds NaN or infinite values"):
        run(parts, {"samples": SPOILT})


EMBEDDING = torch.zeros(1, 5, 32)
CONDITIONINGS = {
    "no list": (3, "no conditioning"),
    "a bare tensor": (EMBEDDING, "no conditioning"),
    "no entries": ([], "conditioning is empty"),
    "no values": ([[EMBEDDING]], "no conditioning"),
    "values that are none": ([[EMBEDDING, None]], "no conditioning"),
    "an embedding without a batch": ([[EMBEDDING[0], {}]], r"shape \(5, 32\)"),
    "an empty embedding": ([[EMBEDDING[:, :0], {}]], r"shape \(1, 0, 32\)"),
    "whole numbers": ([[EMBEDDING.long(), {}]], r"\(torch.int64\)"),
    "NaN in the second": ([[EMBEDDING, {}], [EMBEDDING * NAN, {}]], "holds NaN or infinite values"),
}


@pytest.mark.parametrize("socket", ["positive", "negative"])
@pytest.mark.parametrize("kind", CONDITIONINGS)
def test_what_is_no_conditioning_is_refused_by_its_sockets_name(parts, socket, kind):
    value, message = CONDITIONINGS[kind]
    with pytest.raises(ValueError, match=f"{socket}.* {message}"):
        history(**{socket: value})
    prompts = {
        name: conditioning(prompt) for name, prompt in zip(("positive", "negative"), oracle.prompts(), strict=True)
    }
    with pytest.raises(ValueError, match=f"{socket}.* {message}"):
        run_node(
            HeliosChunkedSampler,
            parts.model,
            **{**prompts, socket: value},
            latent={"samples": torch.zeros(1, 16, 9, 8, 8)},
            schedule=QUICK,
            seed=3,
        )


@pytest.mark.parametrize("size", [(100, 64), (64, 72)])
def test_a_size_that_latents_cannot_have_is_refused(size):
    with pytest.raises(
        ValueError, match=r"multiples of 16\. The nearest that works with every schedule is (128x64|64x64)"
    ):
        history(width=size[0], height=size[1])


class OtherVAE:
    """A VAE of another shape, as it tells of itself."""

    def __init__(self, channels=16, dimensions=3, ratio=(lambda latents: latents * 4 - 3, 8, 8)):
        self.latent_channels, self.latent_dim, self.upscale_ratio = channels, dimensions, ratio

    def encode(self, pixels):
        raise AssertionError("asked to encode")

    decode = encode


VAES = {
    "no VAE": ("wan_2.1_vae", "of the type str"),  # which can encode, too
    "for images, as many channels": (OtherVAE(dimensions=2, ratio=8), "is one for images or sound"),
    "Wan 2.2": (OtherVAE(48, ratio=(lambda latents: latents * 4 - 3, 16, 16)), "has latents of 48 channels"),
    "16x in space": (OtherVAE(ratio=(lambda latents: latents * 4 - 3, 16, 16)), "33 frames of 9 latents, 16x wider"),
    "8x in time": (OtherVAE(ratio=(lambda latents: latents * 8 - 7, 8, 8)), "65 frames of 9 latents"),
}


@pytest.mark.parametrize("kind", VAES)
def test_a_vae_of_another_shape_is_refused_wherever_one_is_taken(kind):
    vae, message = VAES[kind]
    message = f"{message}.*; expected the Wan 2.1 VAE .*16 channels"
    with pytest.raises(ValueError, match=message):
        run_node(HeliosChunkedVAEDecode, {"samples": torch.zeros(1, 16, 9, 8, 8)}, vae, False)
    for source in ("start_image", "video"):
        with pytest.raises(ValueError, match=message):
            history(vae=vae, **{source: torch.zeros(33, 64, 64, 3)})


def test_the_wan_vae_passes(parts):
    check_vae(parts.vae)


def test_a_vae_that_makes_other_frames_than_it_says_is_refused():
    vae = SimpleNamespace(decode=lambda samples: torch.zeros(1, 9, 64, 64, 3))
    with pytest.raises(ValueError, match=r"shape \(9, 64, 64, 3\); expected \(33, 64, 64, 3\)"):
        decode_chunk(vae, torch.zeros(1, 16, 9, 8, 8))


@pytest.mark.parametrize("value", [None, 3, torch.zeros(3)], ids=lambda value: type(value).__name__)
def test_other_values_are_refused_on_the_sockets_of_schedule_model_and_clip(parts, value):
    latent = {"samples": torch.zeros(1, 16, 9, 8, 8)}
    prompts = [conditioning(prompt) for prompt in oracle.prompts()]
    with pytest.raises(ValueError, match="`schedule` got .*Connect"):
        run_node(HeliosChunkedSampler, parts.model, *prompts, latent, value, 3)
    with pytest.raises(ValueError, match="`schedule` got .*Connect"):
        run_node(HeliosAntiDrift, value, 0.9, 0.9, 0.1, 0.1, 0.1)
    with pytest.raises(ValueError, match="needs a Helios model"):
        run_node(HeliosChunkedSampler, value, *prompts, latent, QUICK, 3)
    with pytest.raises(ValueError, match="needs a Helios model"):
        run_node(HeliosCompile, value)
    with pytest.raises(ValueError, match="UMT5-XXL"):
        run_node(HeliosTextEncode, value, "a fox", "")


def test_what_is_no_conditioning_does_not_come_before_a_prompt_schedule():
    slots = {f"prompt_{i}": "a fox" for i in range(1, 5)} | {f"length_{i}": 5.0 for i in range(1, 5)}
    with pytest.raises(ValueError, match="`before` got no conditioning"):
        run_node(HeliosPromptSchedule, None, "chunks", 0, "", before=[EMBEDDING], **slots)


PICTURES = {
    "float8": (torch.zeros(33, 64, 64, 3).to(torch.float8_e4m3fn), "torch.float8_e4m3fn; expected float"),
    "a single number": (torch.tensor(1.0), r"shape \(\)"),
    "nested": (torch.nested.nested_tensor([torch.zeros(64, 64, 3)] * 2), "expected an IMAGE"),
}


@pytest.mark.parametrize("source", ["start_image", "video"])
@pytest.mark.parametrize("kind", PICTURES)
def test_what_is_no_image_is_refused(parts, source, kind):
    value, message = PICTURES[kind]
    with pytest.raises(ValueError, match=message):
        history(vae=parts.vae, **{source: value})


def test_what_is_neither_image_nor_video_is_refused(parts):
    with pytest.raises(ValueError, match="of the type dict; expected a VIDEO or IMAGE"):
        history(vae=parts.vae, video={})


@pytest.mark.parametrize("rate", [NAN, math.inf, None, "x"])
def test_a_video_whose_rate_is_no_number_is_refused(parts, rate):
    components = Types.VideoComponents(images=torch.zeros(33, 64, 64, 3), frame_rate=rate)
    with pytest.raises(ValueError, match="frames a second; expected more than 0"):
        history(vae=parts.vae, video=InputImpl.VideoFromComponents(components))
