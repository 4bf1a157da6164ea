"""What a LoRA file may hold beside two matrices, by our names and by Wan's: as if merged by hand."""

from __future__ import annotations

import comfy.sd
import pytest
import torch

from comfyui_helios.host.model.loading import load_model
from harness import oracle
from harness.errors import difference
from support.loras import IN_BLOCKS, LAYOUTS, NO_MATRICES, merged
from support.runs import QUICK, make_distilled, sample

CLOSE = 1e-5
NAMES = ["Helios' training", "Wan's own", "musubi"]
LINEAR = [module for module in IN_BLOCKS if module.endswith(("attn1.to_q", "attn2.to_out.0", "ffn.net.2"))]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(str(make_distilled(tmp_path_factory.mktemp("kinds") / "Helios-Distilled")), "fp32")


def weights(modules):
    reference = oracle.transformer(0)
    return {name: w for name, w in reference.named_parameters() if name.removesuffix(".weight") in modules}


def rand(rng, *shape):
    return torch.randn(shape, generator=rng) / shape[-1] ** 0.5


def loha(rng, weight):
    parts = {"hada_w1_a": (weight.shape[0], 3), "hada_w1_b": (3, weight.shape[1])}
    parts = {name: rand(rng, *shape) for name, shape in parts.items()}
    parts |= {name.replace("w1", "w2"): rand(rng, *part.shape) for name, part in parts.items()}
    a, b, c, d = parts.values()
    return parts | {"alpha": torch.tensor(6.0)}, weight + 2 * (a @ b) * (c @ d)


def lokr(rng, weight):
    rows, columns = weight.shape
    parts = {"lokr_w1": rand(rng, 4, 4), "lokr_w2": rand(rng, rows // 4, columns // 4)}
    return parts, weight + torch.kron(*parts.values())


def lokr_in_two(rng, weight):
    rows, columns = weight.shape
    parts = {
        "lokr_w1": rand(rng, 4, 4),
        "lokr_w2_a": rand(rng, rows // 4, 2),
        "lokr_w2_b": rand(rng, 2, columns // 4),
    }
    w1, a, b = parts.values()
    return parts | {"alpha": torch.tensor(4.0)}, weight + 2 * torch.kron(w1, a @ b)


def dora(rng, weight):
    """With a scale for each column: for rows the host (0.3.75) has a norm of its own."""
    down, up, scale = rand(rng, 4, weight.shape[1]), rand(rng, weight.shape[0], 4), 1 + rand(rng, 1, weight.shape[1])
    turned = weight + up @ down
    parts = {"lora_down.weight": down, "lora_up.weight": up, "dora_scale": scale}
    return parts, scale * turned / turned.norm(dim=0, keepdim=True)


def diff(rng, weight):
    part = 0.5 * torch.randn(weight.shape, generator=rng)
    return {"diff": part}, weight + part


KINDS = [loha, lokr, lokr_in_two, dora, diff]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_equals_merging_by_hand(model, tmp_path, kind, name):
    check(model, tmp_path, kind, name, LINEAR)


@pytest.mark.parametrize("name", NAMES)
def test_norms_and_tables_take_a_difference(model, tmp_path, name):
    check(model, tmp_path, diff, name, NO_MATRICES)


def check(model, folder, kind, name, modules):
    rng = torch.Generator().manual_seed(0)
    lora, changed = {}, {}
    found = weights(modules)
    assert len(found) == len(modules)
    for weight_name, weight in found.items():
        module = weight_name.removesuffix(".weight")
        parts, changed[weight_name] = kind(rng, weight)
        lora |= {f"{LAYOUTS[name].spell(module)}.{part}": tensor for part, tensor in parts.items()}
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
    expected = sample(merged(folder, lambda key, weight: changed.get(key, weight)), QUICK)["samples"]
    assert difference(sample(patched, QUICK)["samples"], expected) <= CLOSE
    assert difference(sample(model, QUICK)["samples"], expected) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_biases_take_a_difference(model, tmp_path, name):
    rng = torch.Generator().manual_seed(0)
    reference = oracle.transformer(0)
    added = {m: torch.randn(reference.get_submodule(m).bias.shape, generator=rng) for m in LINEAR}
    lora = {f"{LAYOUTS[name].spell(module)}.diff_b": part for module, part in added.items()}
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora, 0.5, 0.0)
    changed = merged(
        tmp_path, lambda key, x: x + 0.5 * added.get(key.removesuffix(".bias"), 0.0) * key.endswith("bias")
    )
    assert difference(sample(patched, QUICK)["samples"], sample(changed, QUICK)["samples"]) <= CLOSE
