"""A MODEL on several workers, here without cards: one card's latents, faults that are told, nothing left behind."""

from __future__ import annotations

import gc
import os
import signal
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import comfy.model_management
import comfy_extras.nodes_model_merging
import pytest
import torch
from comfy.cli_args import PerformanceFeature, args

from comfyui_helios.helios_core.checkpoint import published_name
from comfyui_helios.helios_core.config import TransformerConfig
from comfyui_helios.helios_core.schedule import BASE
from comfyui_helios.host.cluster import local as subject
from comfyui_helios.host.cluster import workers as group
from comfyui_helios.host.cluster.processes import last_error
from comfyui_helios.host.cluster.remote_model import on_several_cards
from comfyui_helios.host.cluster.version import digest
from comfyui_helios.host.cluster.workers import WorkerError, Workers
from comfyui_helios.host.model.compiled import compile_blocks
from comfyui_helios.host.model.loading import load_model
from comfyui_helios.host.model.offload_patcher import Offloading
from comfyui_helios.host.sampling.guider import HeliosGuider
from comfyui_helios.nodes.cluster import HeliosMultiGPU
from harness import oracle
from harness.errors import difference
from support.cluster import ON_CPU, gone, video, with_lora
from support.quantised import block_layers, write_scaled
from support.runs import make_distilled, run_node
from support.videos import TOLERANCE

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


def processes(model):
    return model.model.diffusion_model.workers.group.processes


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
    del before, offloaded
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
    for thread in threading.enumerate():  # those that wrote to workers, of all groups so far
        if thread.name.endswith("(_write)"):
            thread.join(10)
            assert not thread.is_alive()


def test_scales_of_a_quantised_file_are_for_the_workers_alone(tmp_path):
    """Newer hosts keep a layer's `input_scale` among the weights of the network."""
    own = oracle.weights(oracle.transformer(0))
    weights = {published_name(name): weight for name, weight in own.items()}
    layers, config = block_layers(weights), TransformerConfig(**oracle.TINY)
    more = {"blocks__0__attn1__to_q__input_scale": torch.ones(())}
    model = load_model(str(write_scaled(tmp_path / "a.safetensors", weights, layers, config=config, **more)), "bf16")
    remote = on_several_cards(model, ON_CPU)
    assert {name for name, _ in remote.model.diffusion_model.named_parameters()} == own.keys()


def test_other_loras_are_for_the_same_workers(plain, remote):
    """In front of the node and behind it; of a LoRA each machine has the tensors once, and of two at a time."""
    video(remote)
    before = [process.pid for process in processes(remote)]
    workers = remote.model.diffusion_model.workers
    for strength, seed, files in ((0.8, 0, 1), (0.4, 0, 1), (0.8, 1, 2), (0.8, 2, 2)):
        patched = with_lora(plain, strength, seed)
        model = on_several_cards(patched, ON_CPU, patience=100 + seed) if seed else with_lora(remote, strength, seed)
        assert difference(video(model), video(patched)) <= TOLERANCE
        assert workers.patience == 100 + seed or not seed
        assert len(list(Path(workers.folder.name).glob("*.safetensors"))) == files
    assert difference(video(remote), video(plain)) <= TOLERANCE
    assert [process.pid for process in processes(remote)] == before


def test_workers_that_were_started_anew_within_a_run_are_given_prompts_again(monkeypatch, plain, remote):
    """As where decoding a chunk takes the model's place."""
    expected, denoise = video(plain), HeliosGuider.denoise

    def unloading(self, on_chunk, *args, **more):
        def take(chunk):
            on_chunk(chunk)
            comfy.model_management.unload_all_models()

        return denoise(self, take, before_chunk=lambda position: self.load_again())

    monkeypatch.setattr(HeliosGuider, "denoise", unloading)
    assert difference(video(remote), expected) <= TOLERANCE


def test_another_version_of_the_pack_is_told(monkeypatch, tmp_path, plain):
    """A folder with a space and an umlaut, and --fast, are none of its troubles."""
    folder = tmp_path / "ein schöner Ordner"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(group, "VERSION", "another")
    with pytest.raises(WorkerError, match="is not the version that this ComfyUI runs. Restart ComfyUI if"):
        video(on_several_cards(plain, ON_CPU, patience=5))
    monkeypatch.undo()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(args, "fast", {PerformanceFeature.AutoTune})
    assert difference(video(on_several_cards(plain, ON_CPU, patience=60)), video(plain)) <= TOLERANCE


def test_a_version_is_that_of_the_sources(tmp_path):
    for name in ("helios_core/a.py", "host/model/b.py", "nodes/c.py"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(name)
    before = digest(tmp_path)
    (tmp_path / "nodes" / "c.py").write_text("what workers do not run")
    assert digest(tmp_path) == before
    (tmp_path / "host" / "model" / "b.py").write_text("other")
    assert digest(tmp_path) != before


def test_workers_that_are_ended_while_they_are_asked_say_why(remote):
    video(remote)
    workers = remote.model.diffusion_model.workers
    threading.Timer(0.5, workers.close).start()
    os.kill(processes(remote)[0].pid, signal.SIGSTOP)
    with pytest.raises(WorkerError, match="were ended while they were at work"):
        remote.model.diffusion_model.prepare_text(torch.zeros(1, 8, 32))
    with pytest.raises(WorkerError, match="were ended while they were at work"):
        workers.ask({"do": "flow"}, {})


def test_a_killed_worker_is_told_and_the_next_run_goes_well(plain, remote):
    expected = video(remote)
    first, second = processes(remote)
    second.kill()
    with pytest.raises(WorkerError, match=r"worker 2 of 2 has ended: it was killed \(SIGKILL\)"):
        remote.model.diffusion_model.prepare_text(torch.zeros(1, 8, 32))
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
    workers = object.__new__(Workers)
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
    merge = comfy_extras.nodes_model_merging.ModelMergeSimple().merge
    merged = merge(plain, plain, 0.5)[0]
    compiled = compile_blocks(plain, "eager", "default", None)
    for model, message in ((merged, "a merged model's weights"), (compiled, "compiled code")):
        with pytest.raises(ValueError, match=f"cannot take {message}"):
            video(on_several_cards(model, ON_CPU))
    with pytest.raises(ValueError, match="Take Helios Multi-GPU out to merge a model"):
        merge(plain, on_several_cards(plain, ON_CPU), 0.5)


@pytest.mark.parametrize("lacking", ["is_available", "is_nccl_available"])
def test_where_torch_has_no_nccl_the_node_says_so(monkeypatch, plain, lacking):
    """As on Windows and macOS."""
    monkeypatch.delenv("HELIOS_MULTI_GPU_ON_CPU", raising=False)
    monkeypatch.setattr(torch.distributed, lacking, lambda: False)
    with pytest.raises(ValueError, match=r"needs NCCL, .* on Linux only, for NVIDIA and AMD cards"):
        run_node(HeliosMultiGPU, plain, 2)


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


def test_a_video_too_small_for_its_cards_is_told_before_they_are_asked(monkeypatch, plain):
    network = on_several_cards(plain, ON_CPU).model.diffusion_model
    monkeypatch.setattr(network, "workers", SimpleNamespace(degree=40))
    with pytest.raises(ValueError, match="36 tokens of a chunk are too few for 40"):
        network._flow(torch.zeros(1, 16, 9, 4, 4), torch.zeros(1), None, None, {})


def test_the_last_error_of_a_log_is_found():
    for text, expected in (
        ("", "it said nothing"),
        ("starting\nloading\n", "loading"),
        ("Traceback\n[rank1]: torch.OutOfMemoryError: CUDA out of memory.\nW1 Warning: not destroyed\n", "torch.OutOf"),
        ("ValueError: too long\nException ignored in: <function Store.__del__>\n", "ValueError: too long"),
    ):
        assert last_error(text.splitlines()).startswith(expected)
