"""scripts/convert_lora.py: what Helios' training wrote, as the host's own loader takes it."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import comfy.sd
import comfy.utils
import pytest
import torch
from safetensors.torch import load_file, save_file

from comfyui_helios.host.model.loading import load_model
from harness import oracle
from harness.errors import difference
from support.loras import IN_BLOCKS, LAYOUTS, RANK, added, in_layout, matrices, merged, product, training_metadata
from support.runs import QUICK, sample

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "convert_lora.py"
CLOSE = 1e-5
AMPLIFIED = {"is_amplify_history": True}
WHOLE = (
    "patch_short.weight",
    "patch_mid.bias",
    "patch_long.weight",
    "blocks.0.norm2.weight",
    "blocks.0.norm2.bias",
    "blocks.1.attn1.norm_q.weight",
    "blocks.0.attn1.history_key_scale",
    "norm_out.scale_shift_table",
)


@pytest.fixture(scope="module")
def script():
    """As a namespace; it puts the checkout on sys.path, which other tests must not see."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        yield SimpleNamespace(**runpy.run_path(str(SCRIPT)))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "transformer"
    oracle.transformer(0, **AMPLIFIED).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def trained():
    """Whole weights that are not the base's, by published name."""
    rng = torch.Generator().manual_seed(7)
    weights = dict(oracle.transformer(0, **AMPLIFIED).named_parameters())
    return {name: weights[name] + 0.5 * torch.randn(weights[name].shape, generator=rng) for name in WHOLE}


@pytest.fixture
def sources(tmp_path, trained):
    """The two files of a training: matrices, with alpha in the metadata and a norm, and the partial weights."""
    parts = matrices(IN_BLOCKS)
    norms = {name: x for name, x in trained.items() if "norm" in name}
    lora = in_layout(LAYOUTS["Helios' training"], parts) | {f"transformer.{name}": x for name, x in norms.items()}
    files = [tmp_path / "pytorch_lora_weights.safetensors", tmp_path / "partial.safetensors"]
    save_file(lora, files[0], training_metadata(parts, 2.0))
    save_file({name: x for name, x in trained.items() if name not in norms}, files[1])
    return [str(file) for file in files]


def by_hand(folder, trained, strength, whole_strength):
    deltas = {module: 2.0 / RANK * product(*pair) for module, pair in matrices(IN_BLOCKS).items()}
    with_lora = added(deltas, strength)

    def change(name, weight):
        if name in trained:
            return weight + whole_strength * (trained[name] - weight)
        return with_lora(name, weight)

    return sample(merged(folder / "merged", change, **AMPLIFIED), QUICK)["samples"]


@pytest.mark.parametrize(("with_base", "whole_strength"), [(True, 0.5), (False, 1.0)])
def test_the_hosts_loader_takes_all_of_it(script, base, sources, trained, tmp_path, capsys, with_base, whole_strength):
    """Differences go by the strength, whole weights do not."""
    target = tmp_path / "made.safetensors"
    options = ["--base", str(base)] if with_base else []
    assert script.main([*sources, str(target), *options]) == 0
    kind = "differences of whole weights" if with_base else "whole weights, which take effect at any strength"
    assert f"20 modules with a LoRA, 20 of them with alpha; 8 {kind}" in capsys.readouterr().out
    lora = comfy.utils.load_torch_file(str(target), safe_load=True)
    patched, _ = comfy.sd.load_lora_for_models(load_model(str(base), "fp32"), None, lora, 0.5, 0.0)
    expected = by_hand(tmp_path, trained, 0.5, whole_strength)
    assert difference(sample(patched, QUICK)["samples"], expected) <= CLOSE


def test_what_helios_does_not_have_is_left_out_and_told(script, sources, tmp_path, capsys):
    save_file({"text_encoder.x": torch.ones(2)}, tmp_path / "more.safetensors")
    target = tmp_path / "made.safetensors"
    assert script.main([*sources, str(tmp_path / "more.safetensors"), str(target)]) == 0
    assert "1 tensors left out, which Helios does not have: text_encoder.x" in capsys.readouterr().out
    assert not any("text_encoder" in name for name in load_file(target))


@pytest.mark.skipif(os.name != "posix", reason="POSIX's users")
def test_others_may_read_it_as_they_may_any_new_file(script, sources, tmp_path):
    """ComfyUI may run as somebody else."""
    target, other = tmp_path / "made.safetensors", tmp_path / "other"
    other.touch()
    assert script.main([*sources, str(target)]) == 0
    assert target.stat().st_mode == other.stat().st_mode


@pytest.mark.skipif(os.name != "posix", reason="POSIX's limits")
def test_a_disk_that_is_full_is_told_without_a_traceback(script, sources, tmp_path, capsys):
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        assert script.main([*sources, str(tmp_path / "made.safetensors")]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert capsys.readouterr().err.startswith("error: [Errno 27]")
    assert not list(tmp_path.glob("*made*"))


def test_wrong_inputs_are_told_without_a_traceback(script, sources, base, tmp_path, capsys):
    target = str(tmp_path / "made.safetensors")
    (tmp_path / "transformer_partial.pth").write_bytes(b"anything")
    save_file({"x": torch.ones(2)}, tmp_path / "other.safetensors")
    save_file({"patch_short.weight": torch.ones(2)}, tmp_path / "larger.safetensors")
    for arguments, message in (
        ([str(tmp_path / "transformer_partial.pth"), target], "is a pickle, and opening one can run any code in it"),
        ([sources[0], str(tmp_path / "a.pth")], "must end in .safetensors"),
        ([sources[0], sources[1]], "exists. Choose another name, or overwrite it with --force."),
        ([sources[0], sources[0], target], "both. Leave one of them out."),
        ([str(tmp_path / "other.safetensors"), target], "is of a Helios LoRA: x."),
        ([str(tmp_path / "larger.safetensors"), target, "--base", str(base)], "Give the model that was trained"),
        ([sources[0], target, "--base", str(tmp_path / "none")], "does not exist"),
    ):
        assert script.main(arguments) == 1
        told = capsys.readouterr().err
        assert told.startswith("error: ") and message in told
        assert not list(tmp_path.glob("*made*"))
