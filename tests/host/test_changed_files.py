"""Model files that change while they are in use: never old weights under a new file's name, never a part of each."""

import copy
import os
import shutil

import folder_paths
import pytest
import torch

from comfyui_helios.helios_core.regular_file import CheckpointError
from comfyui_helios.host.files.named_files import fingerprint
from comfyui_helios.host.files.single_file import find_file
from comfyui_helios.host.guard import guarded
from comfyui_helios.host.model.loading import load_model
from comfyui_helios.host.stream import run_folder
from comfyui_helios.host.stream.graph_key import graph_key
from comfyui_helios.nodes.load import HeliosDiffusersLoader, HeliosModelLoader
from harness import oracle
from support.runs import QUICK, sample
from support.streams import GRAPH, Parts, beginning, graph, make_parts, stream_video, temporary_files

CHUNKS = 3
LOADER = "1"


@pytest.fixture
def models(tmp_path, monkeypatch):
    """models/diffusers, models/diffusion_models and an output folder of their own, the official folder in the first."""
    for kind in ("diffusers", "diffusion_models"):
        (tmp_path / kind).mkdir()
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(tmp_path / kind)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path))
    return tmp_path


@pytest.fixture
def official(models):
    return models / "diffusers" / "Helios-Distilled"


@pytest.fixture
def parts(official):
    return make_parts(official)


@pytest.fixture
def weights(official, parts):
    return official / "transformer" / "diffusion_pytorch_model.safetensors"


def truncated(file):
    os.truncate(file, file.stat().st_size // 2)


def written_over(file):
    size = file.stat().st_size
    with file.open("r+b") as stream:
        stream.seek(size // 2)
        stream.write(b"\xff" * (size // 4))
    later(file)


def later(file):
    """File systems that write down whole seconds aside, what is written gets another time."""
    status = file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))


def replaced(file):
    """By a file of the same size and time."""
    status = file.stat()
    other = file.with_name("other")
    other.write_bytes(file.read_bytes())
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(file)


def deleted(file):
    file.unlink()


CHANGES = [truncated, written_over, later, replaced, deleted]


def retrained(file):
    """Another model's weights in its place, as a new download brings."""
    folder = file.parent
    oracle.transformer(1).save_pretrained(folder / "new")
    later(folder / "new" / file.name)
    (folder / "new" / file.name).replace(file)
    shutil.rmtree(folder / "new")


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_on_a_changed_file_is_refused_before_a_weight_is_touched(parts, weights, change):
    change(weights)
    with pytest.raises(CheckpointError, match=r"model\.safetensors has changed since.*Run the graph again"):
        sample(parts.model, QUICK)


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_during_a_run_ends_it_before_the_next_chunk(parts, weights, change):
    chunks = []

    class Watch:
        """A VAE that is there when a chunk is finished."""

        def decode(self, samples):
            chunks.append(samples)
            if len(chunks) == 1:
                change(weights)
            return parts.vae.decode(samples)

    before = temporary_files()  # of other tests
    with pytest.raises(CheckpointError, match="has changed since"):
        stream_video(Parts(parts.model, Watch()), beginning(33 * CHUNKS), overlap_decode="off")
    assert len(chunks) == 1
    assert temporary_files() == before


def test_a_file_that_is_only_read_may_be_used(parts, weights):
    weights.read_bytes()
    weights.chmod(0o444)
    assert torch.isfinite(sample(parts.model, QUICK)["samples"]).all()


def test_a_file_loaded_anew_runs(parts, official, weights):
    before = sample(parts.model, QUICK)["samples"]
    retrained(weights)
    after = sample(load_model(str(official), "fp32"), QUICK)["samples"]
    assert (after - before).abs().max() > 1e-3


@pytest.mark.parametrize("change", CHANGES)
def test_the_host_is_told_to_load_changed_files_anew(models, parts, official, weights, change):
    single = models / "diffusion_models" / "a.safetensors"
    single.write_bytes(weights.read_bytes())
    before = [
        HeliosModelLoader.fingerprint_inputs(model_name="a.safetensors", dtype="auto"),
        HeliosDiffusersLoader.fingerprint_inputs(folder="Helios-Distilled", dtype="auto"),
    ]
    assert before == [fingerprint("a.safetensors"), fingerprint("Helios-Distilled")]
    change(single)
    assert fingerprint("a.safetensors") != before[0]
    assert fingerprint("Helios-Distilled") == before[1]
    change(weights)
    assert fingerprint("Helios-Distilled") != before[1]


@pytest.mark.parametrize("name", ["model_index.json", "vae/config.json", "transformer/config.json"])
def test_small_files_count_too(parts, official, name):
    before = fingerprint("Helios-Distilled")
    later(official / name)
    assert fingerprint("Helios-Distilled") != before


@pytest.mark.parametrize("name", ["\ud800", "x" * 10**6, "../..", "", "a\0b", 5, None, ["3", 0], "nowhere"])
def test_any_name_has_a_fingerprint(models, name):
    assert HeliosModelLoader.fingerprint_inputs(model_name=name) == HeliosModelLoader.fingerprint_inputs()


def test_a_workflow_from_windows_finds_its_file_in_a_folder(models):
    file = models / "diffusion_models" / "video" / "a.safetensors"
    file.parent.mkdir()
    file.write_bytes(b"1234")
    [before, on_windows] = [fingerprint(f"video{slash}a.safetensors") for slash in ("/", "\\")]
    assert find_file("diffusion_models", "video\\a.safetensors") == str(file)
    later(file)
    assert fingerprint("video/a.safetensors") != before
    assert fingerprint("video\\a.safetensors") != on_windows


def test_a_name_on_another_drive_is_one_of_no_file(models, monkeypatch):
    """Where Windows' own functions, which the host asks, raise."""

    def windows(kind, text):
        raise ValueError("path is on mount 'D:', start on mount 'C:'")

    monkeypatch.setattr(folder_paths, "get_full_path", windows)
    with pytest.raises(ValueError, match=r"There is no model 'D:\\a.safetensors' in models/diffusion_models"):
        find_file("diffusion_models", "D:\\a.safetensors")


@pytest.mark.parametrize("name", ["\ud800", "x" * 10**6, "../..", "", "a\0b", 5, None, ["3", 0], "nowhere"])
def test_a_name_of_no_file_is_refused_in_plain_text(models, name):
    with pytest.raises(
        ValueError, match=r"There is no model .* in models/diffusion_models|^`model_name` is (5|None|\[)"
    ) as error:
        guarded(HeliosModelLoader).execute(name, "auto")
    assert str(error.value).encode().isascii()
    assert len(str(error.value)) < 500


def started(prompt):
    """The prompt as the host hands it on: it notes what the loader says of its files."""
    prompt = copy.deepcopy(prompt)
    prompt[LOADER]["is_changed"] = [HeliosDiffusersLoader.fingerprint_inputs(**prompt[LOADER]["inputs"])]
    return prompt


@pytest.mark.parametrize("name", ["transformer/diffusion_pytorch_model.safetensors", "vae/config.json"])
def test_a_key_is_not_made_of_files_that_changed_after_the_graph_was_started(parts, official, name):
    prompt = started(GRAPH)
    assert graph_key(prompt, "5") == graph_key(GRAPH, "5")
    later(official / name)
    with pytest.raises(ValueError, match="'Helios-Distilled' have changed since this graph was started"):
        graph_key(prompt, "5")
    graph_key(started(GRAPH), "5")


def test_a_key_outlives_the_inode(parts, weights):
    """Some file systems number theirs anew at every mount; a resumed run must be known again."""
    before = graph_key(GRAPH, "5")
    replaced(weights)
    assert graph_key(GRAPH, "5") == before


def test_chunks_of_two_models_are_never_joined(models, parts, official, weights):
    """The transformer is replaced while the host still has the old one: nothing is saved under the new file's key."""
    start = beginning(33 * CHUNKS)
    settings = {"start": start, "resume": True, "unique_id": "5"}
    saved = models / "output" / run_folder.FOLDER

    def chunk_files():
        return sorted(saved.rglob("*.safetensors"))

    stream_video(parts, prompt=started(graph()), **settings)
    of_the_old = chunk_files()
    assert len(of_the_old) == CHUNKS
    retrained(weights)
    with pytest.raises(CheckpointError, match="has changed since"):
        stream_video(parts, prompt=started(graph()), **settings)
    assert chunk_files() == of_the_old

    new = Parts(load_model(str(official), "fp32"), parts.vae)
    _, expected = stream_video(new, start)
    _, tail = stream_video(new, prompt=started(graph()), **settings)
    assert torch.equal(tail["samples"], expected["samples"])
    assert len(chunk_files()) == 2 * CHUNKS


@pytest.mark.skipif(os.name != "posix", reason="makes links")
def test_links_in_circles_below_a_model_do_not_count(parts, official):
    before = graph_key(GRAPH, "5")
    for name in "abcdef":
        (official / name).symlink_to(".")
        (official / "transformer" / name).symlink_to("..")
    (official / "usr").symlink_to("/usr")
    assert graph_key(GRAPH, "5") == before


@pytest.mark.skipif(os.name != "posix", reason="makes pipes and links")
def test_what_is_no_file_has_no_part_in_a_key(parts, official):
    before = graph_key(GRAPH, "5")
    os.mkfifo(official / "transformer" / "a.safetensors")
    (official / "vae" / "zero.json").symlink_to("/dev/zero")
    (official / "vae" / "nowhere.json").symlink_to("nowhere")
    (official / "vae" / "folder.json").mkdir()
    assert graph_key(GRAPH, "5") == before
