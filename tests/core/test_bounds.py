"""What a small file claims is bounded by what is there: no network, list or loop is made of a number in a file."""

import json

import pytest
import torch
from safetensors.torch import save_file

from comfyui_helios.helios_core import checkpoint as subject
from comfyui_helios.helios_core.checkpoint import open_checkpoint
from comfyui_helios.helios_core.config import LARGEST, TransformerConfig
from comfyui_helios.helios_core.regular_file import CheckpointError
from comfyui_helios.helios_core.schedule import PRESETS, schedule_from_config
from comfyui_helios.helios_core.transformer import HeliosTransformer

SMALL = TransformerConfig(num_attention_heads=1, text_dim=32, freq_dim=32, ffn_dim=64, num_layers=2)


@pytest.fixture
def folder(tmp_path):
    weights = {k: torch.ones(x.shape) for k, x in HeliosTransformer(SMALL, device="meta").state_dict().items()}
    save_file(weights, tmp_path / "a.safetensors")
    return tmp_path


@pytest.fixture
def built(monkeypatch):
    """How many blocks were built."""
    counts = []

    class Spy(HeliosTransformer):
        def __init__(self, config, **kwargs):
            counts.append(config.num_layers)
            super().__init__(config, **kwargs)

    monkeypatch.setattr(subject, "HeliosTransformer", Spy)
    return counts


def refusal(path):
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(path)
    return str(error.value)


def test_as_many_blocks_as_a_config_claims_are_not_built(folder, built):
    (folder / "config.json").write_text(json.dumps({**SMALL.to_dict(), "num_layers": LARGEST}))
    message = refusal(folder)
    assert f"does not fit a Helios transformer of {LARGEST} blocks" in message
    assert "tensors are missing: blocks.2." in message
    assert built == [1]


@pytest.mark.parametrize("layers", [LARGEST + 1, 10**9, 10**3000])
def test_a_config_of_endlessly_many_blocks_is_refused(folder, layers):
    (folder / "config.json").write_text(json.dumps({**SMALL.to_dict(), "num_layers": layers}))
    assert f"num_layers must be a whole number from 1 to {LARGEST}" in refusal(folder)


def test_a_header_of_very_many_blocks_is_refused(tmp_path, built):
    """From the shapes alone: each name counts for a block."""
    names = {f"blocks.{i}.x": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(60_000)}
    names |= {"patch_short.weight": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}
    text = json.dumps(names).encode()
    file = tmp_path / "a.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    assert "does not fit a Helios transformer of 60000 blocks" in refusal(file)
    assert built == [1]


def test_a_block_more_or_less_than_the_config_says_is_counted(folder):
    per_block = sum(name.startswith("blocks.0.") for name in HeliosTransformer(SMALL, device="meta").state_dict())
    (folder / "config.json").write_text(json.dumps({**SMALL.to_dict(), "num_layers": 3}))
    assert f"{per_block} of" in refusal(folder)
    assert "0 are unexpected." in refusal(folder)
    (folder / "config.json").write_text(json.dumps({**SMALL.to_dict(), "num_layers": 1}))
    assert f"tensors are missing; {per_block} are unexpected: blocks.1." in refusal(folder)


NO_SIZE = [0, -1, True, 2.0, "2", None, [2], LARGEST + 1, 10**18]
NO_NUMBER = [0, -1e-6, True, "1e-6", None, [1.0], 10**400]


@pytest.mark.parametrize("value", NO_SIZE, ids=str)
@pytest.mark.parametrize("name", ["num_attention_heads", "ffn_dim", "text_dim", "num_layers"])
def test_a_size_is_a_whole_number_within_bounds(folder, name, value):
    (folder / "config.json").write_text(json.dumps({**SMALL.to_dict(), name: value}))
    assert f"{name} must be a whole number from 1 to" in refusal(folder)


@pytest.mark.parametrize("value", [[1, 0, 2], [1, 2], 2, "122", [1, 2, 2.0], [1, True, 2], None], ids=str)
def test_a_patch_is_three_sizes(folder, value):
    (folder / "config.json").write_text(json.dumps({**SMALL.to_dict(), "patch_size": value}))
    assert "patch_size" in refusal(folder)


@pytest.mark.parametrize("value", NO_NUMBER, ids=lambda x: str(x)[:9])
@pytest.mark.parametrize("name", ["eps", "rope_theta"])
def test_what_is_divided_by_is_above_zero(folder, name, value):
    text = json.dumps({**SMALL.to_dict(), name: value})
    (folder / "config.json").write_text(text)
    assert f"{name} must be a number above 0" in refusal(folder)


@pytest.mark.parametrize("name", ["eps", "rope_theta"])
@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999"])
def test_what_is_no_finite_number_is_refused(folder, name, value):
    text = json.dumps({**SMALL.to_dict(), name: "HERE"}).replace('"HERE"', value)
    (folder / "config.json").write_text(text)
    assert "config.json is" in refusal(folder)


@pytest.mark.parametrize("name", ["cross_attn_norm", "is_amplify_history", "has_multi_term_memory_patch"])
@pytest.mark.parametrize("value", ["false", 0, 1, None, []])
def test_a_switch_is_true_or_false(folder, name, value):
    (folder / "config.json").write_text(json.dumps({**SMALL.to_dict(), name: value}))
    assert f"{name} must be true or false" in refusal(folder)


def test_heads_times_their_size_is_bounded(folder):
    changes = {"num_attention_heads": LARGEST, "attention_head_dim": LARGEST, "rope_dim": [LARGEST - 4, 2, 2]}
    (folder / "config.json").write_text(json.dumps({**SMALL.to_dict(), **changes}))
    assert f"must be at most {LARGEST}" in refusal(folder)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((0, 16, 1, 2, 2), "another shape"),
        ((128, 16, 1, 0, 2), r"patch_embedding.weight \(128, 16, 1, 0, 2\) for \(128, 16, 1, 2, 2\)"),
        ((128, 16), r"patch_embedding.weight \(128, 16\) for \(128, 16, 1, 2, 2\)"),
        ((10**6 * 128, 0, 1, 2, 2), "num_attention_heads must be a whole number"),
    ],
)
def test_shapes_that_tell_nothing_are_refused(folder, shape, message):
    weights = {k: torch.ones(x.shape) for k, x in HeliosTransformer(SMALL, device="meta").state_dict().items()}
    save_file({**weights, "patch_embedding.weight": torch.ones(shape)}, folder / "a.safetensors")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


@pytest.mark.parametrize("values", ["[]", '["a.safetensors"]', '"a.safetensors"', "null", "5"])
def test_a_weight_map_that_is_no_map_is_refused(folder, values):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ' + values + "}")
    assert "has no 'weight_map' that names the shards" in refusal(folder)


@pytest.mark.parametrize("value", ["true", "false", 1, None, []])
def test_a_pipeline_is_distilled_or_is_not(folder, value):
    (folder / "model_index.json").write_text(json.dumps({"is_distilled": value}))
    assert "which is neither true nor false" in refusal(folder)


NO_SCHEDULE = [
    ({"gamma": 0.5}, "gamma must be above 0 and at most 1/3"),
    ({"gamma": "0.3"}, "gamma must be made of finite numbers"),
    ({"gamma": True}, "gamma must be made of finite numbers"),
    ({"gamma": float("nan")}, "gamma must be made of finite numbers"),
    ({"base_shift": float("inf")}, "shift_mu must be made of finite numbers"),
    ({"max_shift": "1.15"}, "shift_mu must be made of finite numbers"),
    ({"max_shift": 10**400}, "shift_mu must be made of finite numbers"),
    ({"base_image_seq_len": 4096}, "must ascend from above 0"),
    ({"base_image_seq_len": 0}, "must ascend from above 0"),
    ({"max_image_seq_len": None}, "shift_tokens must be made of finite numbers"),
    ({"stage_range": 3}, "stage_range must be made of finite numbers"),
    ({"stage_range": None}, "stage_range must be made of finite numbers"),
    ({"stage_range": "0, 1"}, "stage_range must be made of finite numbers"),
    ({"stage_range": []}, "do not fit|stage_range must"),
    ({"stage_range": [0, 1 / 3, 2 / 3, 0.9]}, "must ascend from 0 to 1"),
    ({"stage_range": [-1, 1 / 3, 2 / 3, 1]}, "must ascend from 0 to 1"),
    ({"stage_range": [0, 5, 2 / 3, 1]}, "must ascend from 0 to 1"),
    ({"stage_range": [0, 1e305, 2 / 3, 1]}, "must ascend from 0 to 1"),
    ({"stage_range": [0, 0.5, 0.5001, 1]}, "must ascend from 0 to 1"),
    ({"use_dynamic_shifting": "false"}, "use_dynamic_shifting must be true or false"),
    ({"time_shift_type": ["linear"]}, "time_shift must be one of"),
    ({"base_shift": -5}, "shifts a stage of"),
    ({"time_shift_type": "exponential", "max_shift": 1e6}, "shifts a stage of"),
]


@pytest.mark.parametrize(("values", "message"), NO_SCHEDULE, ids=lambda x: str(x)[:50])
def test_a_scheduler_file_that_cannot_be_sampled_is_refused_when_it_is_read(values, message):
    with pytest.raises(ValueError, match=message):
        schedule_from_config("distilled", values, {})


def test_guidance_is_cfg_zero_star_or_is_not():
    with pytest.raises(ValueError, match="is_cfg_zero_star must be true or false"):
        schedule_from_config("mid", {}, {"is_cfg_zero_star": "no"})


def test_a_size_that_is_shifted_out_of_all_steps_is_refused():
    """From 2500 x 2500 pixels on every sigma of the exponential shift is 1, and the solver divides by none."""
    PRESETS["base"].check_size(1536, 1536)
    with pytest.raises(ValueError, match="Make a smaller video"):
        PRESETS["base"].check_size(4096, 4096)
