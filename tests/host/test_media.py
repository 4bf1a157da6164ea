"""Pictures and videos of all kinds on their way into a video's history."""

from fractions import Fraction

import comfy.latent_formats
import comfy.model_management
import comfy.utils
import hypothesis.strategies as st
import pytest
import torch
from comfy_api.latest import InputImpl, Types
from diffusers import AutoencoderKLWan, HeliosPyramidPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from hypothesis import given, settings

from comfyui_helios.host.files.vae import load_vae
from comfyui_helios.host.sockets.images import encode_image, encode_video, needed_frames, prepare_images, video_frames
from harness.tiny import make_scheduler, make_vae

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FITS = ("crop", "pad", "stretch")
quick = settings(deadline=None, max_examples=40)


def noise(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


sides = st.integers(1, 40)


@st.composite
def batches(draw):
    """An IMAGE batch as some node may give it, of a size of its own."""
    shape = draw(st.tuples(st.integers(1, 3), sides, sides, st.integers(1, 4)))
    dtype = draw(st.sampled_from((*FLOATS, torch.uint8)))
    values = noise(*shape, seed=draw(st.integers(0, 99)))
    if dtype == torch.uint8:
        return (values * 256).to(dtype)
    return (values * 1.5 - 0.25).to(dtype)  # as a VAE or a sharpening node leaves them


@quick
@given(batches(), sides, sides, st.sampled_from(FITS))
def test_any_image_comes_out_in_the_size_and_range_asked_for(images, width, height, fit):
    given_ = images.clone()
    prepared = prepare_images(images, width, height, fit)
    assert prepared.shape == (len(images), height, width, 3)
    assert prepared.dtype == torch.float32
    assert prepared.min() >= 0
    assert prepared.max() <= 1
    assert torch.equal(images, given_)


@quick
@given(batches(), st.sampled_from(FITS))
def test_an_image_that_fits_is_not_resampled(images, fit):
    _, height, width, channels = images.shape
    expected = images.float().clamp(0, 1) if images.is_floating_point() else images / 255
    expected = expected[..., :1].expand(-1, -1, -1, 3) if channels < 3 else expected[..., :3]
    assert torch.equal(prepare_images(images, width, height, fit), expected)


@quick
@given(sides, sides, sides, sides, st.sampled_from(FITS), st.floats(0, 1))
def test_a_plain_colour_stays_it_and_only_pad_adds_black(width, height, new_width, new_height, fit, level):
    prepared = prepare_images(torch.full((1, height, width, 3), level), new_width, new_height, fit)
    colour = (prepared - level).abs() < 1.01 / 255  # lanczos works on 8 bits
    if fit != "pad":
        assert colour.all()
        return
    scale = min(new_width / width, new_height / height)
    rows, columns = (max(1, round(scale * side)) for side in (height, width))
    top, left = (new_height - rows) // 2, (new_width - columns) // 2
    bars = torch.ones(new_height, new_width, dtype=torch.bool)
    bars[top : top + rows, left : left + columns] = False
    assert (prepared[0, bars] == 0).all()
    assert colour[0, ~bars].all()


@pytest.fixture
def wide():
    """Six columns from black to white, two rows high."""
    return (torch.arange(6) / 5).view(1, 1, 6, 1).expand(1, 2, 6, 3)


def test_crop_cuts_the_centre(wide):
    assert torch.equal(prepare_images(wide, 4, 2, "crop"), wide[:, :, 1:5])


def test_pad_puts_the_whole_image_between_black_bars(wide):
    padded = prepare_images(wide, 6, 4, "pad")
    assert torch.equal(padded[:, 1:3], wide)
    assert (padded[:, [0, 3]] == 0).all()


def test_stretch_ignores_the_aspect_ratio(wide):
    stretched = prepare_images(wide, 6, 4, "stretch")
    assert torch.allclose(stretched, wide[:, :1].expand(1, 4, 6, 3), atol=1.01 / 255)


def test_resampling_is_the_hosts_lanczos():
    images = noise(2, 30, 50, 3)
    expected = comfy.utils.common_upscale(images.movedim(-1, 1), 20, 40, "lanczos", "disabled").movedim(1, -1)
    assert torch.equal(prepare_images(images, 20, 40, "stretch"), expected)
    cut = images[:, :, 17:32]  # 15:30 is 20:40
    expected = comfy.utils.common_upscale(cut.movedim(-1, 1), 20, 40, "lanczos", "disabled").movedim(1, -1)
    assert torch.equal(prepare_images(images, 20, 40, "crop"), expected)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("shape", [(1, 1), (2160, 3840), (1280, 720), (1, 4001), (4001, 1), (1, 1000)])
def test_sizes_at_the_edge(shape, fit):
    image = torch.full((1, *shape, 3), 0.5)
    prepared = prepare_images(image, 64, 64, fit)
    assert prepared.shape == (1, 64, 64, 3)
    assert abs(prepared[0, 31, 31, 0] - 0.5) < 1.01 / 255


@pytest.mark.parametrize("shape", [(8, 8, 3), (8, 8), (1, 2, 8, 8, 3), (0, 8, 8, 3), (1, 0, 8, 3), (1, 8, 8, 5)])
def test_what_is_no_image_is_refused(shape):
    with pytest.raises(ValueError, match=r"shape \(.*expected \(frames, height, width, 1 to 4 channels\).*Connect"):
        prepare_images(torch.zeros(shape), 8, 8, "crop")


@pytest.mark.parametrize("dtype", [torch.int16, torch.int64, torch.bool])
def test_numbers_of_another_kind_are_refused(dtype):
    with pytest.raises(ValueError, match=f"{dtype}; expected float in 0..1 or uint8"):
        prepare_images(torch.zeros((1, 8, 8, 3), dtype=dtype), 8, 8, "crop")


@quick
@given(
    st.sampled_from([float("nan"), float("inf"), -float("inf")]),
    st.sampled_from(FLOATS),
    st.integers(1, 3),
    st.sampled_from(FITS),
)
def test_values_that_are_no_numbers_are_refused(value, dtype, channels, fit):
    images = noise(2, 5, 6, channels).to(dtype)
    images[1, 2, 3, 0] = value
    with pytest.raises(ValueError, match="Image 2 holds NaN or infinite values; expected numbers in 0..1"):
        prepare_images(images, 8, 8, fit)


def test_a_broken_alpha_is_dropped_with_the_rest_of_it():
    images = noise(1, 8, 8, 4)
    images[..., 3] = float("nan")
    assert torch.equal(prepare_images(images, 8, 8, "crop"), images[..., :3])


def numbered(frames, channels=3):
    return torch.arange(frames, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 2, 2, channels)


def video(images, rate):
    return InputImpl.VideoFromComponents(Types.VideoComponents(images=images, frame_rate=rate))


def shown(images, picked):
    return images[list(picked), 0, 0, 0].int().tolist()


def parts(pixels, latents):
    """What of a video goes into a history of so many latent frames."""
    begin, skipped = needed_frames(len(pixels), latents)
    return pixels[:1], pixels[begin:], skipped


def test_an_image_batch_is_taken_as_it_is():
    images = numbered(50)
    assert video_frames(images) == (images, range(50))


@pytest.mark.parametrize("rate", [Fraction(24), 24.0])
def test_a_video_of_24_fps_is_untouched(rate):
    images = numbered(50)
    assert video_frames(video(images, rate)) == (images, range(50))


@pytest.mark.parametrize(
    ("rate", "frames", "expected"),
    [
        (30, 10, [0, 1, 3, 4, 5, 6, 8, 9]),
        (48, 6, [1, 3, 5]),
        (12, 3, [0, 0, 1, 1, 2, 2]),
        (8, 2, [0, 0, 0, 1, 1, 1]),
        (60, 1, [0]),
    ],
)
def test_a_video_of_another_rate_is_resampled_in_time(rate, frames, expected):
    assert shown(*video_frames(video(numbered(frames), Fraction(rate)))) == expected


def test_two_seconds_of_30_fps_are_48_frames():
    assert len(video_frames(video(numbered(60), Fraction(30)))[1]) == 48


def test_a_video_of_no_images_is_refused_before_it_is_resampled():
    with pytest.raises(ValueError, match="int64; expected float in 0..1 or uint8"):
        video_frames(video(numbered(10).long(), Fraction(1, 10**9)))


def test_a_video_that_is_hardly_any_frames_a_second_is_refused_at_once():
    with pytest.raises(ValueError, match="has 240000000000 frames at 24 a second; expected at most 1000000"):
        video_frames(video(numbered(10), Fraction(1, 10**9)))


def test_a_hardly_slower_video_loses_no_frame():
    assert shown(*video_frames(video(numbered(240), Fraction(24000, 1001)))) == list(range(240))


@quick
@given(st.integers(1, 200), st.fractions(Fraction(1), Fraction(240), max_denominator=1001))
def test_resampling_keeps_duration_order_and_nearest_frames(frames, rate):
    picked = shown(*video_frames(video(numbered(frames), rate)))
    assert abs(Fraction(len(picked), 24) - frames / rate) <= Fraction(1, 48) or len(picked) == 1
    assert picked == sorted(picked)
    for position, source in enumerate(picked):  # the middles of both frames, in seconds
        distance = abs(Fraction(2 * position + 1, 48) - (source + Fraction(1, 2)) / rate)
        assert distance <= max(Fraction(1, 2) / rate, Fraction(1, 48))


def test_a_long_video_of_another_rate_is_not_copied():
    images = numbered(20_000)
    frames, picked = video_frames(video(images, Fraction(30)))
    assert frames is images and len(picked) == 16_000


@pytest.mark.parametrize("rate", [24, 30])
@pytest.mark.parametrize(("images", "what"), [(numbered(0), r"shape \(0, 2, 2, 3\)"), (None, "type NoneType")])
def test_a_video_without_frames_is_refused(images, what, rate):
    with pytest.raises(ValueError, match=what):
        video_frames(video(images, Fraction(rate)))


def test_a_video_without_a_rate_is_refused():
    with pytest.raises(ValueError, match="0 frames a second; expected more than 0.*as IMAGE"):
        video_frames(video(numbered(40), Fraction(0)))


HEIGHT, WIDTH = 64, 96


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights")
    make_vae(7).save_pretrained(path / "vae")
    return path


@pytest.fixture(scope="module")
def vae(folder):
    return load_vae(folder)


@pytest.fixture
def reference(folder, monkeypatch):
    """The reference's own encoding, with the mean of the VAE's posterior, as the host's VAE gives it."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    theirs = AutoencoderKLWan.from_pretrained(folder / "vae")
    pipeline = HeliosPyramidPipeline(
        tokenizer=None, text_encoder=None, vae=theirs, scheduler=make_scheduler("distilled"), transformer=None
    )
    mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (theirs.config.latents_mean, theirs.config.latents_std))
    options = {"latents_mean": mean, "latents_std": 1 / std, "num_latent_frames_per_chunk": 9, "dtype": torch.float32}

    def encode(images=None, frames=None):
        with torch.no_grad():
            if images is not None:
                return pipeline.prepare_image_latents(images.movedim(-1, 1) * 2 - 1, **options)
            return pipeline.prepare_video_latents(frames.movedim(-1, 0)[None] * 2 - 1, **options)

    return encode


def same(ours, theirs):
    assert (ours.dtype, ours.device.type, ours.shape) == (torch.float32, "cpu", theirs.shape)
    assert theirs.std() > 0.1
    assert (ours - theirs).abs().max() <= 1e-4


@torch.no_grad()
def test_images_are_encoded_as_in_the_reference(vae, reference):
    images = noise(2, HEIGHT, WIDTH, 3)
    anchor, last = reference(images=images)
    history = encode_image(vae, images)
    same(history.anchor, anchor)
    same(history.latents, last)
    assert (anchor - last).abs().max() > 1e-2  # or it would not show if one were taken for the other


@torch.no_grad()
@pytest.mark.parametrize("frames", [33, 80])
def test_a_video_is_encoded_as_in_the_reference(vae, reference, frames):
    pixels = noise(frames, HEIGHT, WIDTH, 3)
    anchor, latents = reference(frames=pixels)
    history = encode_video(vae, *parts(pixels, 99))
    assert latents.shape[2] == frames // 33 * 9
    same(history.anchor, anchor)
    same(history.latents, latents)


@torch.no_grad()
def test_images_of_a_batch_do_not_see_each_other(vae):
    images = noise(2, HEIGHT, WIDTH, 3)
    both, second = encode_image(vae, images), encode_image(vae, images[1:])
    assert torch.equal(both.anchor[1:], second.anchor)
    assert torch.equal(both.latents[1:], second.latents)


@torch.no_grad()
def test_half_precision_latents_of_the_host_are_normalised_in_float32(vae):
    class Half:
        def encode(self, pixels):
            return vae.encode(pixels).bfloat16()

    image = noise(1, HEIGHT, WIDTH, 3)
    expected = comfy.latent_formats.Wan21().process_in(Half().encode(image).float())
    assert torch.equal(encode_image(Half(), image).anchor, expected)


@pytest.mark.parametrize("frames", [1, 2, 32])
def test_a_short_video_is_refused(frames):
    plural = "s" if frames > 1 else ""
    with pytest.raises(ValueError, match=rf"has {frames} frame{plural} at 24 fps; expected at least 33\..*start_image"):
        needed_frames(frames, 19)


class Encoder:
    """A VAE that gives latents of some shape."""

    def __init__(self, *shape):
        self.shape = shape
        self.calls = 0

    def encode(self, pixels):
        self.calls += 1
        return torch.zeros(self.shape)


@pytest.mark.parametrize(
    "shape",
    [(1, 48, 1, 4, 6), (1, 4, 8, 12), (1, 16, 8, 12), (1, 128, 1, 2, 3), (1, 16, 1, 4, 6), (1, 16, 2, 8, 12)],
    ids=["Wan 2.2", "SD", "Flux", "LTX", "16x in space", "two for one frame"],
)
@pytest.mark.parametrize("encode", [encode_image, lambda vae, x: encode_video(vae, x, x.expand(33, -1, -1, -1))])
def test_another_vae_is_refused(shape, encode):
    with pytest.raises(ValueError, match=r"shape \(.*expected \(1, 16, 1, 8, 12\).*Wan 2.1 VAE"):
        encode(Encoder(*shape), torch.zeros(1, HEIGHT, WIDTH, 3))


def test_encoding_can_be_cancelled_between_two_chunks():
    class Cancelled(Encoder):
        def encode(self, pixels):
            comfy.model_management.interrupt_current_processing()
            return super().encode(pixels)

    vae = Cancelled(1, 16, 1, 8, 12)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        encode_video(vae, *parts(torch.zeros(99, HEIGHT, WIDTH, 3), 19))
    assert vae.calls == 1


@torch.no_grad()
def test_progress_reaches_its_end(vae, monkeypatch):
    seen = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, *_, **__: seen.append((value, total)))
    encode_video(
        vae, *parts(noise(66, HEIGHT, WIDTH, 3), 19)
    )  # newer hosts leave out what follows too fast, never the last
    assert seen[-1] == (3, 3)
    encode_image(vae, noise(2, HEIGHT, WIDTH, 3))
    assert seen[-1] == (4, 4)
