"""The results in docs/: every row is there or named as open, and the picture is drawn from the numbers."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = sorted((ROOT / "docs" / "benchmarks").glob("cpu-*.json"))
ROWS = {
    "forward_stage0",
    "forward_stage1",
    "forward_stage2",
    "forward_extra_memory",
    "chunk_111",
    "chunk_222",
    "chunk_222_12_layers",
    "chunk_222_per_layer",
    "node_overhead",
    "chunk_time_slope",
    "decode_fp32",
    "decode_batch_2",
    "decode_channels_last",
    "decode_bf16",
    "decode_bf16_batch_2",
    "decode_bf16_channels_last",
}


@pytest.fixture(autouse=True)
def benchmarks_on_path(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_results_are_whole_and_drawn(path):
    from plot import draw

    results = json.loads(path.read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in results["rows"]}
    assert set(rows) >= ROWS
    for row in rows.values():
        assert row["ratio"] == pytest.approx(row["peer"] / row["ours"])
    assert [cost["chunks"] for cost in results["cost_of_chunks"]] == [1, 4, 16, 44]
    assert {"processor", "cores", "torch", "diffusers"} <= set(results["machine"])
    assert path.with_suffix(".svg").read_text(encoding="utf-8") == draw(results)


def test_there_are_results():
    assert RESULTS


def test_peak_memory_is_what_was_live_at_once():
    import torch
    from measure import peak_extra_bytes

    def two_then_one():
        a = torch.empty(1_000_000)
        b = torch.empty(2_000_000)
        del a, b
        torch.empty(500_000)

    assert 12_000_000 <= peak_extra_bytes(two_then_one) < 12_100_000


def test_medians_are_taken_in_turns():
    from measure import in_turns

    order = []
    in_turns(lambda: order.append("A"), lambda: order.append("B"), turns=3)
    assert "".join(order) == "ABABAB"


def test_weights_whose_writing_was_cut_off_are_not_there(monkeypatch, tmp_path):
    import safetensors.torch
    from memory_gpu import save_whole

    def cut_off(weights, file, metadata):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save_file", cut_off)
    with pytest.raises(KeyboardInterrupt):
        save_whole(tmp_path / "vae" / "a.safetensors", {})
    assert not list(tmp_path.glob("**/*.safetensors"))
