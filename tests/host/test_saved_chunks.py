"""A saved chunk comes back as it was; one whose checksum fits, and whose content does not, is made again."""

from dataclasses import replace

import comfy.model_management
import folder_paths
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from comfyui_helios.host.stream import run_folder
from comfyui_helios.host.stream import saved_chunks as resume
from comfyui_helios.host.stream.saved_chunks import HistoryLayout, Statistics, open_run
from support.saved_runs import KEY, KIND, SHAPE, count, make_chunk, save_run


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    return tmp_path / run_folder.FOLDER / KEY


def test_memory_comes_back_as_it_was():
    layout = resume.HistoryLayout((4, 2, 3), keep_first_frame=False)
    statistics = resume.Statistics(torch.rand(2, 16), torch.rand(2, 16))
    past, anchor = torch.rand(2, 16, layout.frames, 4, 6), torch.rand(2, 16, 1, 4, 6)
    memory = resume.Memory(past, anchor, layout, statistics, drifted=True)
    rng = torch.Generator().manual_seed(5)
    torch.randn(7, generator=rng)
    chunk = resume.SavedChunk(torch.rand(2, 16, 9, 4, 6).bfloat16(), memory, rng.get_state())
    kind = resume.Kind(chunk.latents.shape, layout, watched=True)
    with resume.open_run("a" * 64, kind, "") as saved:
        saved.save(0, chunk)
    with resume.open_run("a" * 64, kind, "") as again:
        assert again.count(5) == (1, None)
        loaded = again.load(0)
    assert loaded.latents.dtype == torch.bfloat16
    assert torch.equal(loaded.latents, chunk.latents)
    assert (loaded.memory.layout, loaded.memory.drifted) == (layout, True)
    assert torch.equal(loaded.memory.latents, past)
    assert torch.equal(loaded.memory.anchor, anchor)
    assert torch.equal(loaded.memory.statistics.mean, statistics.mean)
    assert torch.equal(loaded.memory.statistics.var, statistics.var)
    restored = torch.Generator()
    restored.set_state(loaded.rng_state)
    assert restored.initial_seed() == 5
    assert torch.equal(torch.randn(3, generator=restored), torch.randn(3, generator=rng))


def test_cancel_is_noticed_while_saved_chunks_are_counted():
    """An hour of video has 18 GB of them."""
    save_run()
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        count()


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-50] ^= 1
    path.write_bytes(data)


def change_metadata(path, **changed):
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() | changed
    save_file(load_file(path), path, metadata)


def copy_the_first(path):
    path.write_bytes(path.with_name("chunk_00000.safetensors").read_bytes())


HARMED = [
    (lambda path: path.write_bytes(path.read_bytes()[:-100]), "is damaged or no safetensors file"),
    (lambda path: path.write_bytes(b""), "is damaged or no safetensors file"),
    (lambda path: torch.save({"latents": torch.zeros(3)}, path), "is damaged or no safetensors file"),
    (flip_a_bit, "is damaged: its contents do not fit its checksum"),
    (copy_the_first, "it is another chunk"),
    (lambda path: change_metadata(path, key="0" * 64), "it belongs to another graph"),
    (lambda path: change_metadata(path, format="helios chunk 99"), "it is no chunk of Helios, or of another version"),
    (lambda path: save_file({"weight": torch.zeros(3)}, path), "is no chunk of this video: it holds "),
]


@pytest.mark.parametrize(("harm", "reason"), HARMED, ids=lambda value: value if isinstance(value, str) else "")
def test_a_file_that_is_not_the_chunk_is_refused_by_name(folder, harm, reason):
    save_run()
    path = folder / "chunk_00001.safetensors"
    harm(path)
    done, problem = count()
    assert done == 1
    assert problem.startswith(str(path)) and reason in problem


def with_memory(chunk, **values):
    return replace(chunk, memory=replace(chunk.memory, **values))


FOREIGN = {
    "another size": lambda chunk: replace(chunk, latents=torch.rand(1, 16, 9, 4, 8)),
    "a batch of 3": lambda chunk: replace(chunk, latents=torch.rand(3, 16, 9, 4, 6)),
    "one number": lambda chunk: replace(chunk, latents=torch.tensor(1.0)),
    "integers": lambda chunk: replace(chunk, latents=torch.ones(SHAPE, dtype=torch.int32)),
    "float8": lambda chunk: replace(chunk, latents=torch.ones(SHAPE).to(torch.float8_e4m3fn)),
    "NaN": lambda chunk: replace(chunk, latents=torch.full(SHAPE, torch.nan)),
    "an infinite memory": lambda chunk: with_memory(chunk, latents=chunk.memory.latents / 0),
    "a short memory": lambda chunk: with_memory(chunk, latents=chunk.memory.latents[:, :, 1:]),
    "no anchor": lambda chunk: with_memory(chunk, anchor=None),
    "no statistics": lambda chunk: with_memory(chunk, statistics=None),
    "statistics of another batch": lambda chunk: with_memory(
        chunk, statistics=Statistics(torch.rand(2, 16), torch.rand(2, 16))
    ),
    "another layout": lambda chunk: with_memory(chunk, layout=HistoryLayout((3, 3, 3))),
    "drifted is a text": lambda chunk: with_memory(chunk, drifted="yes"),
    "a short rng_state": lambda chunk: replace(chunk, rng_state=chunk.rng_state[:100]),
    "an rng_state of floats": lambda chunk: replace(chunk, rng_state=chunk.rng_state.float()),
    "an rng_state of ones": lambda chunk: replace(chunk, rng_state=torch.full_like(chunk.rng_state, 255)),
}


@pytest.mark.parametrize("change", FOREIGN.values(), ids=FOREIGN)
def test_a_chunk_that_is_not_the_runs_is_made_again(folder, change):
    with open_run(KEY, KIND, "note") as run:
        run.save(0, make_chunk())
        run.save(1, change(make_chunk()))
    done, problem = count()
    assert done == 1
    assert problem.startswith(f"{folder / 'chunk_00001.safetensors'} is no chunk of this video: ")


DESCRIBED = {
    "no JSON": "sizes",
    "a list": "[]",
    "nested": "[" * 100_000,
    "nothing": None,
    "no sizes": '{"drifted": true}',
    "infinite": '{"sizes": [Infinity], "drifted": true}',
}


@pytest.mark.parametrize("memory", DESCRIBED.values(), ids=DESCRIBED)
def test_a_memory_that_is_not_described_is_made_again(folder, memory):
    save_run()
    path = folder / "chunk_00001.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = {name: value for name, value in file.metadata().items() if name not in ("digest", "memory")}
    if memory is not None:
        metadata["memory"] = memory
    tensors = load_file(path)
    metadata["digest"] = resume._digest(tensors, metadata)
    save_file(tensors, path, metadata)
    done, problem = count()
    assert done == 1
    assert "is no chunk of this video" in problem


def test_a_file_larger_than_a_chunk_is_not_read(folder):
    save_run()
    with (folder / "chunk_00001.safetensors").open("r+b") as file:
        file.truncate(10**12)  # takes no room, and would take all memory
    done, problem = count()
    assert done == 1
    assert "is larger than a chunk of this video" in problem


def test_a_run_without_anti_drift_resumes(folder):
    kind = replace(KIND, watched=False)
    with open_run(KEY, kind, "note") as run:
        run.save(0, with_memory(make_chunk(), statistics=None))
    with open_run(KEY, kind, "note") as run:
        assert run.count(5) == (1, None)
