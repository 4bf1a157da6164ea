"""`make gpu`, rehearsed on toy sizes: every part has its file and its rows, and none takes the others along."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GPU = ROOT / "benchmarks" / "gpu.py"
ROWS = {  # of what every machine has, at least one a part
    "tests_fused": "test_bf16_rounds_no_worse_than_plain_torch",
    "tests_parity": "test_float32_is_that_of_the_processor[mid]",
    "network": "chunk_222",
    "compiled": "chunk_222_compiled",
    "offload_block_host": "seconds_a_chunk_block_host",
    "tests_offload": "test_a_video_has_the_same_bits[leaf-True]",
    "decoding": "decode_bf16_channels_last_compiled",
    "tests_compiled": "test_bf16_rounds_no_worse_than_eager_blocks",
    "offload_resident": "seconds_a_chunk_resident",
    "offload_leaf_disk": "seconds_a_chunk_leaf_disk",
    "quantised": "forward_stage2_fp8_scaled",
    "cards": "forward_stage2_gloo_2",
}
NOT_HERE = {  # other pairs of what two parts of offloading have; and those in a ComfyUI: tests/server rehearses one
    *("offload_block_disk", "offload_leaf_host"),
    *("comfyui_first_run", "comfyui_14b", "comfyui_lowvram", "comfyui_block", "comfyui_patched"),
    *("comfyui_dynamic_vram", "comfyui_leaf"),
}
NETWORK = {  # a row of each of its sections
    *("matrix_peak", "forward_stage2_fused", "decode_bf16_channels_last", "fps_overlapped_222_fused"),
    *("profile_forward_stage2_idle", "profile_chunk_222_matrix_products", "forward_stage0", "attention_math"),
    *("kernel_rms_norm_rope", "forward_stage2_flash_attention"),
}
ABOUT = {"network": "planted", "machine": {"gpu": "card", "processor": "", "commit": "c0ffee"}}


@pytest.fixture(autouse=True)
def benchmarks_on_path(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def rehearse(folder, *options, env=None):
    command = [sys.executable, str(GPU), "--tiny", "--folder", str(folder), *options]
    return subprocess.run(command, capture_output=True, text=True, env=env)


@pytest.fixture
def plant(tmp_path):
    """Parts of a run, of Python code that may use `row(name)`."""
    from parts import Part

    def planted(name, code, seconds=60):
        file = str(tmp_path / f"{name}.json")
        start = f"import sys, time; sys.path.insert(0, {str(ROOT / 'benchmarks')!r})\n"
        start += "from dataclasses import make_dataclass; from pathlib import Path; from parts import add_row\n"
        start += "Row = make_dataclass('Row', ('name', 'ours', 'peer', 'unit', 'ratio', 'note'))\n"
        start += f"row = lambda name: add_row(Path({file!r}), Row(name, 1.0, None, 's', None, ''))\n"
        return Part(name, seconds, [sys.executable, "-c", start + code])

    return planted


def run(parts, folder, **options):
    from parts import run

    return run(parts, folder, ABOUT, chosen=[part.name for part in parts], **options)


def results(folder):
    return {part["part"]: part for part in json.loads((folder / "summary.json").read_text(encoding="utf-8"))["parts"]}


@pytest.mark.timeout(900)
def test_a_rehearsal_runs_every_kind_of_part(tmp_path):
    done = rehearse(tmp_path, "--only", *ROWS)
    assert done.returncode == 0, done.stdout
    parts = results(tmp_path)
    assert parts.keys() == ROWS.keys() | NOT_HERE
    for name, row in ROWS.items():
        assert json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8")) == parts[name]
        assert parts[name]["state"] == "done"
        assert next(r["ours"] for r in parts[name]["rows"] if r["name"] == row) > 0
        assert {"gpu", "driver", "torch", "triton", "commit", "code"} <= set(parts[name]["about"]["machine"])
        assert f"| {name} | {row} |" in (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert all(row["ours"] for row in parts["tests_fused"]["rows"])  # none is skipped: these tests run nowhere else
    assert {row["name"] for row in parts["network"]["rows"] if row["ours"]} >= NETWORK
    listed = (tmp_path / "profile.txt").read_text(encoding="utf-8")
    assert all(f"{name}: " in listed for name in ("forward_stage2, fused", "chunk_222, eager"))
    assert not (tmp_path / "scratch").exists()


def test_every_file_of_tests_has_a_part():
    files = {file.stem.replace("test_", "tests_") for file in (ROOT / "tests" / "gpu").glob("test_*.py")}
    assert files == {name for name in ROWS if name.startswith("tests_")}


def test_a_missing_library_is_listed(tmp_path, monkeypatch):
    hide = "import sys\nfor name in ('accelerate', 'pytest'): sys.modules[name] = None\n"
    (tmp_path / "sitecustomize.py").write_text(hide, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = rehearse(tmp_path, "--only", "tests_parity", "offload_leaf_disk")
    assert done.returncode == 0, done.stdout
    parts = results(tmp_path)
    assert [(parts[name]["state"], parts[name]["note"]) for name in ("tests_parity", "offload_leaf_disk")] == [
        ("missing", "pytest not installed"),
        ("missing", "accelerate not installed"),
    ]
    assert parts["network"]["state"] == ""


def test_without_a_comfyui_its_parts_are_listed(tmp_path, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    done = rehearse(tmp_path / "results", "--only", "comfyui_14b")
    assert done.returncode == 0, done.stdout
    part = results(tmp_path / "results")["comfyui_14b"]
    assert part["state"] == "missing"
    assert part["note"].startswith(f"{tmp_path} is no ComfyUI checkout.")
    assert not part["rows"]


def test_what_overruns_or_fails_leaves_the_rest(tmp_path, plant):
    beats = tmp_path / "beats"
    child = f"import time\nwhile True: open({str(beats)!r}, 'a').write('.'); time.sleep(0.01)"
    parts = [
        plant("good", "row('a')"),
        plant("endless", f"row('b'); import subprocess; subprocess.run([sys.executable, '-c', {child!r}])", seconds=5),
        plant("broken", "row('c'); raise ValueError('what is wrong')"),
        plant("crashed", "import os, signal; row('d'); os.kill(os.getpid(), signal.SIGSEGV)"),
        plant("last", "row('e')"),
    ]
    assert not run(parts, tmp_path)
    found = results(tmp_path)
    assert {name: part["state"] for name, part in found.items()} == {
        "good": "done",
        "endless": "timed out",
        "broken": "failed",
        "crashed": "failed",
        "last": "done",
    }
    assert [row["name"] for part in found.values() for row in part["rows"]] == ["a", "b", "c", "d", "e"]
    assert "killed after 10 s" in found["endless"]["note"]
    assert found["broken"]["note"] == "ValueError: what is wrong"
    assert "SIGSEGV" in found["crashed"]["note"]
    size = beats.stat().st_size
    time.sleep(0.5)
    assert 0 < size == beats.stat().st_size  # what the part had started is ended, too


def test_a_further_run_goes_on(tmp_path, plant):
    first = [plant("one", "row('a')"), plant("two", "row('b'); sys.exit(1)"), plant("three", "row('c')", seconds=900)]
    assert not run(first, tmp_path, seconds=600)
    found = results(tmp_path)
    assert [found[name]["state"] for name in ("one", "two", "three")] == ["done", "failed", "left out"]
    assert "900 s" in found["three"]["note"]
    further = [plant("one", "sys.exit(1)"), plant("two", "row('B')"), plant("three", "row('C')")]
    assert run(further, tmp_path)
    assert [row["name"] for part in results(tmp_path).values() for row in part["rows"]] == ["a", "B", "C"]
    assert not run(further, tmp_path, fresh=True)


def test_what_a_part_is_of_is_kept_with_it(tmp_path, plant):
    def on(version, code):
        return replace(plant("one", code), about={"comfyui": version})

    assert run([on("0.3.75", "row('a')"), plant("two", "")], tmp_path)
    assert run([on("0.3.75", "sys.exit(1)")], tmp_path)  # which it had run in
    assert not run([on("0.33.0", "sys.exit(1)")], tmp_path)
    assert (tmp_path / "summary.md").read_text().startswith("planted on card, commit c0ffee, ComfyUI 0.33.0: one.")


def test_a_summary_is_made_of_what_a_cut_off_run_left(tmp_path, plant):
    from parts import summarise

    parts = [plant("one", "row('a')"), plant("two", "row('b'); time.sleep(600)"), plant("three", "")]
    run(parts[:1], tmp_path)
    cut_off = {"part": "two", "state": "running", "note": "", "about": ABOUT, "rows": []}
    (tmp_path / "two.json").write_text(json.dumps(cut_off), encoding="utf-8")
    lines = summarise(parts, tmp_path).splitlines()
    assert "| one | a | 1 |  |  | s |  |" in lines
    assert "| two | **cut off** |  |  |  |  |  |" in lines
    assert "| three | **not run yet** |  |  |  |  |  |" in lines
    assert lines[0] == "planted on card, commit c0ffee: one, two."
