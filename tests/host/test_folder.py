"""The official folder's text encoder and VAE in the host against transformers' and diffusers' own classes."""

import json
import shutil
import sys

import pytest
import torch
from diffusers import AutoencoderKLWan, HeliosPipeline
from safetensors.torch import load as parse
from safetensors.torch import save_file
from transformers import UMT5EncoderModel

from comfyui_helios.host.files import text_encoder as subject
from comfyui_helios.host.files.text_encoder import load_text_encoder
from comfyui_helios.host.files.vae import load_vae
from comfyui_helios.host.sockets.text_encoding import tokenize
from harness.tiny import make_loud, make_official_folder

PROMPT = "A red fox runs through fresh snow while the camera follows it from the side."


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "Helios-Base"
    make_official_folder(path, "base")
    return path


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    path = tmp_path_factory.mktemp("sharded") / "Helios-Base"
    make_official_folder(path, "base", shards=True)
    assert len(list((path / "text_encoder").glob("*.safetensors"))) > 1
    return path


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "Helios-Base")


def encoded(clip, text=PROMPT):
    return clip.encode_from_tokens(tokenize(clip, text))


def of_reference(folder, text=PROMPT):
    pipeline = HeliosPipeline.from_pretrained(folder, transformer=None, vae=None)
    with torch.no_grad():
        return pipeline.encode_prompt(text, max_sequence_length=512, do_classifier_free_guidance=False)[0]


def edit(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize("layout", ["whole", "sharded"])
def test_text_encoder_equals_transformers(request, layout):
    folder = request.getfixturevalue(layout)
    expected = of_reference(folder)
    assert (encoded(load_text_encoder(folder, torch.float32)) - expected).abs().max() <= 1e-4
    assert expected.abs().max() > 1


def test_text_encoder_where_the_host_takes_tensors_over_instead_of_copying(whole, monkeypatch):
    # Dynamic VRAM is for GPUs; what we hand to the host then must be of the right dtype throughout.
    monkeypatch.setattr(subject, "_host_assigns", lambda disable_dynamic: True)
    seen = {}
    load = subject.comfy.sd.load_text_encoder_state_dicts

    def spy(tensors, **options):
        seen.update(tensors[0])
        return load(tensors, **options)

    monkeypatch.setattr(subject.comfy.sd, "load_text_encoder_state_dicts", spy)
    clip = load_text_encoder(whole, torch.bfloat16)
    assert {t.dtype for name, t in seen.items() if name != "spiece_model"} == {torch.bfloat16}
    assert (encoded(clip) - of_reference(whole)).abs().max() < 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_text_encoder_keeps_its_weights_in_the_dtype_asked_for(whole, dtype):
    clip = load_text_encoder(whole, dtype)
    weights = {k: v for k, v in clip.get_sd().items() if "encoder" in k or "shared" in k}
    assert {v.dtype for v in weights.values()} == {dtype}
    assert torch.nn.functional.cosine_similarity(encoded(clip).flatten(), of_reference(whole).flatten(), 0) > 0.99


@pytest.mark.parametrize(("stored", "expected"), [(torch.float32, None), (torch.bfloat16, torch.bfloat16)])
def test_text_encoder_without_a_dtype_is_never_wider_than_it_need_be(copy, stored, expected):
    file = copy / "text_encoder" / "model.safetensors"
    save_file({k: v.to(stored) for k, v in parse(file.read_bytes()).items()}, file)
    weight = load_text_encoder(copy).get_sd()["umt5xxl.transformer.shared.weight"]
    assert weight.dtype == (expected or subject.comfy.model_management.text_encoder_dtype())


def test_text_encoder_reads_an_embedding_stored_under_its_second_name(copy):
    file = copy / "text_encoder" / "model.safetensors"
    tensors = parse(file.read_bytes())
    tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")
    save_file(tensors, file)
    assert (encoded(load_text_encoder(copy, torch.float32)) - of_reference(copy)).abs().max() <= 1e-4


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_text_encoder_takes_no_more_memory_than_its_weights(copy, tmp_path):
    from transformers import UMT5Config

    config = UMT5Config.from_pretrained(copy / "text_encoder", d_model=1024, d_ff=4096, num_layers=8)
    make_loud(UMT5EncoderModel(config), 0).save_pretrained(copy / "text_encoder")  # 430 MB in fp32

    def anonymous():
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

    before = anonymous()
    clip = load_text_encoder(copy, torch.bfloat16)
    weights = sum(p.numel() * p.element_size() for p in clip.cond_stage_model.parameters())
    assert weights > 150e6
    assert anonymous() - before <= weights + 20e6


@pytest.mark.parametrize("base_dim", [1, 4, 96])  # the tiny one, one with steady norms, the real one
def test_vae_equals_diffusers(whole, copy, base_dim):
    if base_dim != 1:
        shutil.rmtree(copy / "vae")
        make_loud(AutoencoderKLWan(base_dim=base_dim, z_dim=16), 3).save_pretrained(copy / "vae")
    size, frames = (16, 5) if base_dim == 96 else (32, 9)
    rng = torch.Generator().manual_seed(0)
    pixels = torch.rand(frames, size, size, 3, generator=rng)
    latents = torch.randn(1, 16, (frames + 3) // 4, size // 8, size // 8, generator=rng)
    ours, theirs = load_vae(copy), AutoencoderKLWan.from_pretrained(copy / "vae")
    with torch.no_grad():
        mean = theirs.encode(pixels.movedim(-1, 0)[None] * 2 - 1).latent_dist.mean
        video = (theirs.decode(latents).sample.movedim(1, -1) / 2 + 0.5).clamp(0, 1)
    assert ((ours.encode(pixels) - mean).abs().max() / mean.abs().max()) <= 1e-4
    assert ours.decode(latents).shape == video.shape == (1, frames, size, size, 3)
    assert (ours.decode(latents) - video).abs().max() <= 1e-4
    assert video.std() > 0.05 and mean.std() > 0.05  # or the comparison says nothing


def test_tiny_video_is_colourful_and_moves(whole):
    video = load_vae(whole).decode(torch.randn(1, 16, 9, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert video.std(dim=(0, 1, 2, 3)).min() > 0.1
    assert (video[:, 1:] - video[:, :-1]).abs().mean() > 0.05
    assert (video.amax(-1) - video.amin(-1)).mean() > 0.1  # channels differ: no grey


def test_clones_can_be_made_anew_from_the_folder(whole):
    # Newer hosts make copies for other devices and for torch.compile by calling what the loader left there.
    for part, expected in ((load_text_encoder(whole, torch.float32), "umt5xxl"), (load_vae(whole), "decoder")):
        factory, arguments = part.patcher.cached_patcher_init
        again = factory(*arguments)
        assert any(expected in name for name, _ in again.model.named_parameters())
        assert again.model is not part.patcher.model


@pytest.mark.parametrize(
    ("lost", "load"),
    [
        ("text_encoder", load_text_encoder),
        ("text_encoder/config.json", load_text_encoder),
        ("text_encoder/model.safetensors", load_text_encoder),
        ("tokenizer", load_text_encoder),
        ("tokenizer/spiece.model", load_text_encoder),
        ("vae", load_vae),
        ("vae/config.json", load_vae),
        ("vae/diffusion_pytorch_model.safetensors", load_vae),
    ],
)
def test_a_missing_part_is_named(copy, lost, load):
    target = copy / lost
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    with pytest.raises(ValueError, match=f"(?s){target.name}.*Download"):
        load(copy)


def test_a_missing_shard_is_named(sharded, tmp_path):
    copy = shutil.copytree(sharded, tmp_path / "Helios-Base")
    shard = sorted((copy / "text_encoder").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=f"lacks 1 of .* shards: {shard.name}"):
        load_text_encoder(copy)


@pytest.mark.parametrize(
    "name", ["../../secret.safetensors", "/etc/x.safetensors", "pytorch_model.bin", 3, r"..\x.safetensors"]
)
def test_an_index_that_points_elsewhere_is_not_followed(sharded, tmp_path, name):
    copy = shutil.copytree(sharded, tmp_path / "Helios-Base")
    edit(copy / "text_encoder" / "model.safetensors.index.json", weight_map={"shared.weight": name})
    with pytest.raises(ValueError, match=r"index\.json names .* no \.safetensors file in its own folder"):
        load_text_encoder(copy)


@pytest.mark.parametrize(
    ("file", "load"),
    [("text_encoder/model.safetensors", load_text_encoder), ("vae/diffusion_pytorch_model.safetensors", load_vae)],
)
def test_truncated_or_lacking_or_foreign_weights_are_refused(copy, file, load):
    file = copy / file
    whole, tensors = file.read_bytes(), parse(file.read_bytes())
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is truncated"):
        load(copy)
    name = "encoder.block.1.layer.1.layer_norm.weight" if "text" in str(file) else "decoder.conv_in.bias"
    save_file({k: v for k, v in tensors.items() if k != name}, file)
    with pytest.raises(ValueError, match=r"1 missing: .*0 unexpected"):
        load(copy)
    save_file({**tensors, "stranger": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="0 missing; 1 unexpected: stranger"):
        load(copy)
    save_file({"stranger": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="Download"):
        load(copy)


@pytest.mark.parametrize("values", [{"z_dim": 48}, {"is_residual": True}, {"dim_mult": [1, 2, 4, 8]}])
def test_a_vae_of_another_kind_is_refused(copy, values):
    edit(copy / "vae" / "config.json", **values)
    with pytest.raises(ValueError, match=f"{next(iter(values))}.*but the vae of Helios"):
        load_vae(copy)


@pytest.mark.parametrize(
    "values", [{"model_type": "t5"}, {"relative_attention_num_buckets": 64}, {"dense_act_fn": "relu"}]
)
def test_a_text_encoder_of_another_kind_is_refused(copy, values):
    edit(copy / "text_encoder" / "config.json", **values)
    with pytest.raises(ValueError, match=f"{next(iter(values))}.*but the text_encoder of Helios"):
        load_text_encoder(copy)


def test_a_config_of_another_size_is_refused(copy):
    edit(copy / "text_encoder" / "config.json", d_ff=128)
    with pytest.raises(ValueError, match=r"another shape than its config\.json"):
        load_text_encoder(copy)


def test_the_same_seed_makes_the_same_folder(whole, tmp_path):
    make_official_folder(tmp_path / "a", "base")
    make_official_folder(tmp_path / "b", "base", seed=1)
    files = sorted(f.relative_to(whole) for f in whole.rglob("*") if f.is_file())
    assert all((whole / f).read_bytes() == (tmp_path / "a" / f).read_bytes() for f in files)
    assert any((whole / f).read_bytes() != (tmp_path / "b" / f).read_bytes() for f in files)
