"""A MODEL on several workers, here without cards: one card's latents, faults that are told, nothing left behind."""

from __future__ import annotations

import gc
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import comfy.model_management
import comfy.sd
import comfy_extras.nodes_model_merging
import pytest
import torch

from comfyui_helios.helios_core.schedule import BASE
from comfyui_helios.host.cluster import workers as subject
from comfyui_helios.host.cluster.remote_model import on_several_cards
from comfyui_helios.host.cluster.workers import WorkerError, last_error
from comfyui_helios.host.model.compiled import compile_blocks
from comfyui_helios.host.model.loading import load_model
from comfyui_helios.host.model.offload_patcher import Offloading
from comfyui_helios.nodes.cluster import HeliosMultiGPU
from harness.errors import difference
from support.runs import QUICK, make_distilled, run_node, sample
from support.videos import TOLERANCE

ON_CPU = (None, None)
GUIDED = replace(BASE, steps=(2,), guidance_scale=2.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(make_distilled(tmp_path_factory.mktemp("cluster")))


@pytest.fixture(scope="module")
def plain(folder):
    return load_model(folder, "fp32")


@pytest.fixture(scope="module")
def remote(plain):
    yield on_several_cards(plain, ON_CPU)
    comfy.model_management.unload_all_models()


def video(model, schedule=QUICK, **more):
    return sample(model, schedule, chunks=2, **more)["samples"]


def processes(model):
    return model.model.diffusion_model.workers.processes


def lora(model):
    rng = torch.Generator().manual_seed(0)
    weights = {}
    for name, parameter in model.model.diffusion_model.named_parameters():
        if name.endswith(("to_q.weight", "proj.weight")) and parameter.ndim == 2:
            for side, shape in (("A", (4, parameter.shape[1])), ("B", (parameter.shape[0], 4))):
                key = f"diffusion_model.{name.removesuffix('.weight')}.lora_{side}.weight"
                weights[key] = 0.2 * torch.randn(shape, generator=rng)
    return weights


def with_lora(model):
    return comfy.sd.load_lora_for_models(model, None, lora(model), 0.8, 0)[0]


def gone(pid):
    try:
        return "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True


def listening(pids):
    """Addresses at which these processes listen, as Linux writes them."""
    sockets = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            target = os.readlink(link)
            if target.startswith("socket:["):
                sockets.add(target[len("socket:[") : -1])
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in sockets:
                found.append(fields[1].split(":")[0])
    return found


def test_same_latents_as_on_one_card(plain, remote):
    assert difference(video(remote), video(plain)) <= TOLERANCE


def test_workers_stay_for_the_next_run_whatever_it_is(plain, remote):
    """Guided, in a batch, of another size."""
    video(remote)
    before = [process.pid for process in processes(remote)]
    more = {"batch": 2, "size": (64, 128)}
    assert difference(video(remote, GUIDED, **more), video(plain, GUIDED, **more)) <= TOLERANCE
    assert [process.pid for process in processes(remote)] == before


def test_what_workers_keep_of_a_run_is_forgotten_after_it(remote):
    video(remote)
    gc.collect()
    workers = remote.model.diffusion_model.workers
    # Prompt and last history; the first chunk's history was forgotten when the second's was prepared.
    assert sorted(workers.forgotten) == [workers.numbers - 2, workers.numbers]


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="Linux tells who listens")
def test_nobody_else_can_reach_a_worker(remote):
    video(remote)
    found = listening([process.pid for process in processes(remote)])
    assert found and set(found) == {"0100007F"}  # 127.0.0.1


def test_loras_travel_and_offloading_is_done_by_the_workers(folder, plain):
    """Also one that is put on after the node, and on fp8. Workers end when their model is unloaded, or is no more."""
    expected = video(with_lora(plain))
    assert difference(expected, video(plain)) > 1e-3
    offloaded = load_model(folder, "fp32", offloading=Offloading("block"))
    before = on_several_cards(with_lora(offloaded), ON_CPU)
    assert difference(video(before), expected) <= TOLERANCE
    pids = [process.pid for process in processes(before)]
    del before
    gc.collect()
    comfy.model_management.cleanup_models()
    small = load_model(folder, "fp8_e4m3fn")
    after = with_lora(on_several_cards(small, ON_CPU))
    assert difference(video(after), video(with_lora(small))) <= TOLERANCE
    assert all(map(gone, pids))

    pids, files = [process.pid for process in processes(after)], Path(after.model.diffusion_model.workers.folder.name)
    assert files.exists() and after.loaded_size() == after.model_size() == small.model_size()
    comfy.model_management.unload_all_models()
    assert all(map(gone, pids)) and not files.exists() and after.loaded_size() == 0


def test_a_killed_worker_is_told_and_the_next_run_goes_well(plain, remote):
    expected = video(remote)
    first, second = processes(remote)
    began = time.monotonic()
    second.kill()
    with pytest.raises(WorkerError, match=r"worker 2 of 2 has ended: it was killed \(SIGKILL\)"):
        remote.model.diffusion_model.workers.ask({"do": "flow"}, {})
    assert time.monotonic() - began < 10
    assert gone(first.pid) and gone(second.pid)
    assert torch.equal(video(remote), expected)


def test_a_worker_that_hangs_is_told(monkeypatch, remote):
    """Though it reads nothing: what it is sent is more than a pipe holds."""
    video(remote)
    pids = [process.pid for process in processes(remote)]
    monkeypatch.setattr(subject, "TO_END", 0.5)
    workers = remote.model.diffusion_model.workers
    monkeypatch.setattr(workers, "job", replace(workers.job, patience=1.0))
    os.kill(pids[1], signal.SIGSTOP)
    with pytest.raises(WorkerError, match="worker 2 of 2 did not answer within 1 s"):
        remote.model.diffusion_model.prepare_text(torch.zeros(1, 100_000, 32))
    assert all(map(gone, pids))


def test_what_fails_in_a_worker_is_told(plain, caplog):
    """A file that is not there, for one; and the server's log has what led to it."""
    broken = on_several_cards(plain, ON_CPU)
    broken.job = replace(broken.job, path="/nowhere/Helios")
    with pytest.raises(WorkerError, match=r"has ended: .*CheckpointError: /nowhere/Helios does not exist"):
        video(broken)
    assert "in open_checkpoint" in caplog.text


def test_patience_grows_with_the_slowest_step(remote):
    workers = object.__new__(subject.Workers)
    for slowest, asked, expected in ((0.0, 0.0, 600.0), (1.0, 0.0, 60.0), (30.0, 0.0, 300.0), (30.0, 7.0, 7.0)):
        workers.slowest, workers.job = slowest, replace(remote.job, patience=asked)
        assert workers.patience == expected


def replaced_block(model):
    model.set_model_patch_replace(lambda args, extra: extra["original_block"](args), "dit", "double_block", 0)


def own_attention(model):
    model.model_options["transformer_options"]["optimized_attention_override"] = replaced_block


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaced_block, r"a replaced block, of replaced_block \(test_cluster\)"),
        (own_attention, r"an attention of its own, of replaced_block"),
        (lambda model: model.add_object_patch("diffusion_model.proj_out", None), "a replaced part .*proj_out"),
        (lambda model: model.add_patches({KEY: ("diff", (torch.ones(1), object()))}), "a patch of another kind"),
    ],
    ids=["block", "attention", "module", "patch"],
)
def test_what_cannot_travel_is_refused_by_name(plain, change, message):
    model = plain.clone()
    change(model)
    with pytest.raises(ValueError, match=f"Multi-GPU cannot take {message}.*Take out the node"):
        video(on_several_cards(model, ON_CPU))


KEY = "diffusion_model.proj_out.weight"


def test_compiled_and_merged_models_are_refused(plain):
    merged = comfy_extras.nodes_model_merging.ModelMergeSimple().merge(plain, plain, 0.5)[0]
    compiled = compile_blocks(plain, "eager", "default", None)
    for model, message in ((merged, "a merged model's weights"), (compiled, "compiled code")):
        with pytest.raises(ValueError, match=f"cannot take {message}"):
            video(on_several_cards(model, ON_CPU))


def test_without_cards_the_node_says_so(monkeypatch, plain):
    monkeypatch.delenv("HELIOS_MULTI_GPU_ON_CPU", raising=False)
    with pytest.raises(ValueError, match="set to 2 cards, and ComfyUI sees 0 on this machine"):
        run_node(HeliosMultiGPU, plain, 2)
    with pytest.raises(ValueError, match="3 cards are too many: this model has 2 attention heads"):
        run_node(HeliosMultiGPU, plain, 3)
    with pytest.raises(ValueError, match="went through Helios Multi-GPU already"):
        on_several_cards(on_several_cards(plain, ON_CPU), ON_CPU)
    with pytest.raises(ValueError, match="Helios Multi-GPU needs a Helios model"):
        run_node(HeliosMultiGPU, torch.nn.Linear(1, 1), 2)


@pytest.mark.parametrize(("visible", "expected"), [("", ("0", "1")), ("3, GPU-7,5", ("3", "GPU-7"))])
def test_cards_are_those_that_the_server_sees(monkeypatch, plain, visible, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(comfy.model_management, "get_torch_device", lambda: torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    [model] = run_node(HeliosMultiGPU, plain, 2, 90)
    assert (model.job.cards, model.job.patience) == (expected, 90)


def test_weights_that_every_worker_converts_are_told(monkeypatch, folder, plain, shown):
    monkeypatch.setenv("HELIOS_MULTI_GPU_ON_CPU", "1")
    for model, told in ((plain, 0), (load_model(folder, "bf16"), 1)):
        shown.clear()
        run_node(HeliosMultiGPU, model, 2, unique_id="5")
        assert [("each of 2 workers converts" in text, node) for text, node in shown] == [(True, "5")] * told


def test_the_last_error_of_a_log_is_found():
    for text, expected in (
        ("", "it said nothing"),
        ("starting\nloading\n", "loading"),
        ("Traceback\n[rank1]: torch.OutOfMemoryError: CUDA out of memory.\nW1 Warning: not destroyed\n", "torch.OutOf"),
    ):
        assert last_error(text.splitlines()).startswith(expected)
