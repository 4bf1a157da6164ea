"""Whatever a name or a file holds, what a node says of it can be printed, logged and shown as text."""

import asyncio
import inspect
import logging
import re
import traceback
from html.parser import HTMLParser
from pathlib import Path

import execution
import folder_paths
import pytest
from comfy_api.latest import io

from comfyui_helios.helios_core.regular_file import CheckpointError
from comfyui_helios.host import messages
from comfyui_helios.host.cluster.workers import WorkerError
from comfyui_helios.host.files import official
from comfyui_helios.host.guard import guarded
from comfyui_helios.host.out_of_memory import OutOfMemory
from comfyui_helios.host.printable import listable, printable_log
from comfyui_helios.host.stream.run_folder import InUse
from comfyui_helios.host.stream.saved_chunks import BadChunk
from comfyui_helios.nodes import HeliosExtension
from comfyui_helios.nodes.load import HeliosModelLoader
from comfyui_helios.nodes.prompts import HeliosPromptFromFile

PACK = Path(inspect.getfile(HeliosExtension)).parents[1]
HOSTILE = "a\ud800b\x1b[31m"
SHOWN = r"a\ud800b\x1b[31m"


def all_nodes():
    return asyncio.run(HeliosExtension().get_node_list())


class Node(io.ComfyNode):
    """Raises as nodes do: with an error that led to it."""

    @classmethod
    def define_schema(cls):
        return io.Schema(node_id="Node", inputs=[io.Combo.Input("text", options=[])])

    @classmethod
    def validate_inputs(cls, text):
        return f"{text} is refused."

    @classmethod
    def fingerprint_inputs(cls, text):
        raise FileNotFoundError(2, f"no {text}")

    @classmethod
    def execute(cls, text):
        try:
            raise KeyError(text)
        except KeyError as error:
            raise ValueError(f"{text} is unknown.") from error


def raised_by(method):
    with pytest.raises(Exception) as caught:
        method(text=HOSTILE)
    return caught.value


def test_an_error_and_what_led_to_it_are_printable():
    error = raised_by(guarded(Node).execute)
    assert type(error) is ValueError
    assert str(error) == f"{SHOWN} is unknown."
    report = "".join(traceback.format_exception(error))
    assert report.encode("ascii")  # no surrogate, no escape code
    assert "\x1b" not in report


def test_a_systems_error_keeps_its_number():
    error = raised_by(guarded(Node).fingerprint_inputs)
    assert error.errno == 2
    assert str(error) == f"[Errno 2] no {SHOWN}"


def test_a_refusal_is_printable():
    assert guarded(Node).validate_inputs(text=HOSTILE) == f"{SHOWN} is refused."


def test_an_error_of_a_megabyte_is_cut():
    with pytest.raises(ValueError) as caught:
        guarded(Node).execute(text="x" * 10**6)
    assert len(str(caught.value)) < 5000


@pytest.mark.parametrize("node", all_nodes(), ids=lambda node: node.__name__)
def test_the_host_sees_the_same_node(node):
    [plain] = node.__bases__
    for name in ("validate_inputs", "fingerprint_inputs", "execute"):
        assert inspect.getfullargspec(getattr(node, name)) == inspect.getfullargspec(getattr(plain, name))
        own = getattr(plain, name).__func__ is not getattr(io.ComfyNode, name).__func__
        assert (name in vars(node)) == own
    assert node.define_schema().node_id == plain.define_schema().node_id


def test_a_refused_name_is_printable():
    [loader] = [node for node in all_nodes() if issubclass(node, HeliosModelLoader)]
    with pytest.raises(ValueError) as caught:
        loader.execute(model_name=HOSTILE, dtype="auto")
    assert SHOWN in str(caught.value)


def test_log_lines_are_printable(caplog):
    with caplog.at_level(logging.WARNING):
        printable_log("test_guard").warning("%s at 100 %%: %s", HOSTILE, 5)
    assert caplog.messages == [f"{SHOWN} at 100 %: 5"]


def test_every_log_of_ours_is_such_a_log():
    files = [file for floor in ("nodes", "host") for file in (PACK / floor).rglob("*.py")]
    logs = {file.name for file in files if re.search(r"logging\.getLogger|\bprint\(", file.read_text())}
    assert logs == {"printable.py"}


def test_what_a_node_shows_is_the_same_text_whether_a_page_takes_it_for_html_or_not(shown):
    messages.tell('<img src=x onerror="a"> </b> &lt; [[label|https://x.org]] __LNK0__ \x1b\ud800\nsecond line', "7")
    [(text, _)] = shown
    as_seen = r'<img src=x onerror="a"> </b> &lt; [[label|https://x.org]] __LNK0__ \x1b\ud800' + "\nsecond line"
    assert text.replace(messages.WORD_JOINER, "") == as_seen
    pieces = []
    page = HTMLParser()
    page.handle_data = pieces.append
    page.feed(text)
    page.close()
    assert "".join(pieces) == text  # no tag, no entity
    assert not re.search(r"\[\[|__LNK", text)  # of which a page makes links


@pytest.mark.parametrize("kind", [CheckpointError, OutOfMemory, WorkerError, InUse, BadChunk])
def test_what_the_page_shows_before_an_error_is_no_path(kind):
    assert execution.full_type_name(kind) == kind.__name__


def test_what_a_node_shows_is_bounded(shown):
    messages.tell("x" * 10**6, "7")
    assert len(shown[0][0]) < 5000


UNLISTED = ["caf\udce9", "\x1b[31mred", "two\nlines", "<img src=x onerror=hack>"]


def test_names_that_the_page_cannot_show_are_left_out_and_the_log_says_so_once(caplog):
    names = ["plain", "Ein Café & 狐狸", *(f"{name}.left_out" for name in UNLISTED)]
    with caplog.at_level(logging.WARNING):
        assert listable(names) == listable(names) == ["plain", "Ein Café & 狐狸"]
    assert len(caplog.messages) == len(UNLISTED)
    assert r"'caf\udce9.left_out' is on no list" in caplog.text


def test_every_list_of_options_leaves_them_out(tmp_path, monkeypatch, nothing_shipped):
    inputs, diffusers, models = (tmp_path / name for name in ("input", "diffusers", "diffusion_models"))
    for name in ["plain", *UNLISTED]:
        (diffusers / name / "transformer").mkdir(parents=True)
        (diffusers / name / "transformer" / "config.json").write_text("{}")
        for file in (inputs / f"{name}.txt", models / f"{name}.safetensors"):
            file.parent.mkdir(exist_ok=True)
            file.touch()
    monkeypatch.setattr(folder_paths, "input_directory", str(inputs))
    for kind, folder in (("diffusers", diffusers), ("diffusion_models", models)):
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(folder)], {".safetensors"}))
    assert official.list_folders() == ["plain"]
    assert HeliosModelLoader.define_schema().inputs[0].options == ["plain.safetensors"]
    assert HeliosPromptFromFile.define_schema().inputs[0].options == ["plain.txt"]
