"""torch.compile: the same video chunk by chunk, with histories and prompts that change, and plain words where not."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers import set_torch_compile_wrapper

from comfyui_helios.helios_core.generate import Run
from comfyui_helios.helios_core.history import Memory
from comfyui_helios.helios_core.schedule import BASE
from comfyui_helios.helios_core.video import PromptTrack
from comfyui_helios.host.model import compiled as compile_module
from comfyui_helios.host.model.compiled import TIMING_KEY, compile_blocks, why_not
from comfyui_helios.host.model.loading import load_model
from comfyui_helios.host.model.network import HeliosNetwork
from comfyui_helios.host.model.offload_patcher import is_compiled, offloading
from comfyui_helios.host.model.run_cache import CACHE_KEY
from comfyui_helios.host.sampling.guider import HeliosGuider
from comfyui_helios.host.sampling.whole_video import collect
from comfyui_helios.host.sockets.conditioning import set_track
from comfyui_helios.nodes.compile import HeliosCompile
from harness import oracle
from harness.errors import difference
from support.runs import QUICK, run_node

ONE_STAGE = replace(BASE, steps=(2,), guidance_scale=1.0)
CHUNKS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    oracle.transformer(0, num_layers=3).save_pretrained(path / "transformer")
    return str(path / "transformer")


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder, "fp32")


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()


def sample(model, schedule=ONE_STAGE):
    """Three chunks, a new prompt from the second on."""
    first, second = oracle.prompts(seed=5)
    positive = set_track([[first, {}]], PromptTrack((first, second), (1, 2), 0))
    guider = HeliosGuider(model, Run(schedule, Memory.empty(1, 8, 8), CHUNKS, torch.Generator().manual_seed(0)))
    guider.set_conds(positive, [[second, {}]])
    return collect(guider)


def assert_same_chunks(video, expected):
    """Chunk by chunk: a stale history or prompt shows from the second one on."""
    for ours, theirs in zip(video.split(9, dim=2), expected.split(9, dim=2), strict=True):
        assert difference(ours, theirs) < 1e-5


def skip_transformer_options(guards):
    """As the core TorchCompileModel node of newer hosts compiles."""
    return [("transformer_options" not in guard.name) for guard in guards]


@pytest.mark.parametrize("schedule", [QUICK, replace(ONE_STAGE, guidance_scale=5.0)], ids=["pyramid", "guided"])
def test_compiled_blocks_make_the_same_video(model, schedule):
    compiled = compile_blocks(model, "aot_eager", "default", None)
    expected = sample(model, schedule)
    assert_same_chunks(sample(compiled, schedule), expected)
    assert_same_chunks(sample(compiled, schedule), expected)
    assert torch.equal(sample(model, schedule), expected)  # the MODEL itself is as it was


@pytest.mark.parametrize("options", [None, {"guard_filter_fn": skip_transformer_options}], ids=["0.3.75", "newer"])
def test_the_cores_own_compile_node_makes_the_same_video(model, options):
    """The network as a whole, with and without guards on transformer_options; it must not take up a run's cache."""
    clone = model.clone()
    set_torch_compile_wrapper(clone, backend="aot_eager", options=options)
    expected = sample(model)
    assert_same_chunks(sample(clone), expected)
    assert_same_chunks(sample(clone), expected)


def test_blocks_are_compiled_by_stage_not_one_by_one(model):
    """Two graphs a stage: one for all blocks that pass the history on, one for the last."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    clone = compile_blocks(model, backend, "default", None)
    sample(clone, QUICK)
    assert len(graphs) == 2 * 3


def test_compiled_blocks_use_the_prepared_prompts(model, monkeypatch):
    prepared = []
    original = HeliosNetwork.prepare_text
    monkeypatch.setattr(HeliosNetwork, "prepare_text", lambda self, text: prepared.append(1) or original(self, text))
    sample(compile_blocks(model, "aot_eager", "default", None))
    assert len(prepared) == 2


def test_a_whole_compiled_network_does_not_read_the_cache(model):
    memory = Memory.empty(1, 8, 8)
    past = memory.history()
    arguments = (torch.randn(1, 16, 9, 8, 8), torch.tensor([500.0]), oracle.prompts()[0], None)
    values = {
        "history_long": past.long,
        "history_mid": past.mid,
        "history_short": past.short,
        "history_layout": memory.layout,
    }
    network = model.model.diffusion_model
    with torch.no_grad():
        expected = network(*arguments, {}, **values)
        poisoned = {CACHE_KEY: SimpleNamespace()}  # using it would raise
        assert difference(torch.compile(network, backend="eager")(*arguments, poisoned, **values), expected) < 1e-5


def test_how_long_it_took_is_told(model, caplog, monkeypatch):
    seconds = iter((10.0, 52.4, 52.4, 52.4))
    monkeypatch.setattr(compile_module, "compile_seconds", lambda: next(seconds))
    compiled = compile_blocks(model, "aot_eager", "default", None)
    with caplog.at_level("INFO"):
        sample(compiled)
        assert "Compiling took 42 s of this run" in caplog.text
        caplog.clear()
        sample(compiled)
        assert "Compiling took" not in caplog.text


def test_torch_counts_the_seconds(model):
    before = compile_module.compile_seconds()
    sample(compile_blocks(model, "aot_eager", "default", None))
    assert compile_module.compile_seconds() > before


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "backend", "lacking", "message"),
    [
        (CUDA, "inductor", "triton", "Triton is not installed"),
        (CUDA, "inductor", "capability", "compute capability 7.0, this one has 6.1"),
        (CUDA, "inductor", None, None),
        (CUDA, "cudagraphs", "triton", None),
        (torch.device("xpu"), "inductor", "triton", "Triton is not installed"),
        (torch.device("xpu"), "inductor", None, None),
        (torch.device("mps"), "inductor", None, "compiling was never tried on mps"),
        (torch.device("privateuseone"), "inductor", None, "compiling was never tried on DirectML"),
        (CPU, "cudagraphs", None, "CUDA graphs need an NVIDIA GPU, and the model runs on cpu"),
        (CPU, "inductor", "compiler", "there is no C++ compiler"),
        (CPU, "inductor", None, None),
    ],
)
def test_what_is_missing_is_named(monkeypatch, device, backend, lacking, message):
    monkeypatch.setattr(
        compile_module.importlib.util, "find_spec", lambda name: None if name == lacking else SimpleNamespace()
    )
    capability = (6, 1) if lacking == "capability" else (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(
        compile_module.shutil, "which", lambda name: None if lacking == "compiler" else f"/usr/bin/{name}"
    )
    reason = why_not(device, backend)
    assert (reason is None) if message is None else (message in reason)


def test_without_a_compiler_the_node_says_so_and_runs_eager(model, monkeypatch, caplog):
    monkeypatch.setattr(compile_module.shutil, "which", lambda name: None)
    result = run_node(HeliosCompile, model)[0]
    assert result is model
    assert "Not compiled: there is no C++ compiler" in caplog.text


def test_the_node_compiles_a_clone(model, monkeypatch):
    monkeypatch.setattr(compile_module, "why_not", lambda device, backend: None)
    first = run_node(HeliosCompile, model)[0]
    assert is_compiled(first)
    assert not is_compiled(model)
    again = run_node(HeliosCompile, first, mode="max-autotune")[0]
    assert len(again.get_wrappers(WrappersMP.OUTER_SAMPLE, TIMING_KEY)) == 1


def test_values_of_no_widget_are_refused(model):
    with pytest.raises(ValueError, match="mode must be one of default"):
        run_node(HeliosCompile, model, mode="fast")


def test_another_model_is_refused():
    with pytest.raises(ValueError, match="Helios Compile needs a Helios model, got Module"):
        run_node(HeliosCompile, SimpleNamespace(model=torch.nn.Module()))


def test_not_together_with_group_offloading(folder):
    compiled = compile_blocks(load_model(folder, "fp32", offloading=offloading("block")), "aot_eager", "default", None)
    with pytest.raises(ValueError, match="compile"):
        sample(compiled)
