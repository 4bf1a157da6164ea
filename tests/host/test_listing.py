"""The list of official folders, which the page and every graph ask for: nothing below models/diffusers stops it."""

import json
import logging
import os
import sys
import tempfile
from pathlib import Path

import folder_paths
import pytest

from comfyui_helios.host.files import official as subject
from comfyui_helios.host.files.official import find_folder, list_folders
from comfyui_helios.nodes.load import HeliosDiffusersLoader

HELIOS = json.dumps({"_class_name": "HeliosTransformer3DModel"})
pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="makes links and pipes"),
    pytest.mark.usefixtures("nothing_shipped"),
]


def make(folder: Path, config: str | bytes = HELIOS) -> Path:
    """A folder as far as the list looks into it. Returns its config.json."""
    file = folder / "transformer" / "config.json"
    file.parent.mkdir(parents=True)
    file.write_bytes(config.encode() if isinstance(config, str) else config)
    return file


@pytest.fixture
def models(tmp_path, monkeypatch, caplog):
    """models/diffusers with a good folder in it; what was said before is forgotten."""
    root = tmp_path / "diffusers"
    make(root / "BestWishYsh" / "Helios-Mid")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusers", ([str(root)], {"folder"}))
    monkeypatch.setattr(subject, "_told", set())
    caplog.set_level(logging.WARNING)
    return root


GOOD = ["BestWishYsh/Helios-Mid"]


def a_pipe(file):
    file.unlink()
    os.mkfifo(file)


def a_device(file):
    file.unlink()
    file.symlink_to("/dev/zero")


def a_folder(file):
    file.unlink()
    file.mkdir()


def a_link_to_itself(file):
    file.unlink()
    file.symlink_to(file)


def a_huge_file(file):
    os.truncate(file, 1_500_000_000)


def deep(file):
    file.write_text('{"a":' * 100_000)


def no_json(file):
    file.write_bytes(b"\xff\x00{")


def no_object(file):
    file.write_text("[1]")


HARM = [a_pipe, a_device, a_folder, a_link_to_itself, a_huge_file, deep, no_json, no_object]


@pytest.mark.parametrize("harm", HARM)
def test_one_bad_folder_is_left_out_and_the_loader_stays(models, harm):
    harm(make(models / "other"))
    assert list_folders() == GOOD
    assert HeliosDiffusersLoader.define_schema().inputs[0].options == GOOD


@pytest.mark.parametrize("harm", [a_huge_file, deep, no_json, no_object])
def test_what_is_left_out_is_told_once(models, caplog, harm):
    harm(make(models / "other"))
    for _ in range(3):
        list_folders()
    [message] = [record.getMessage() for record in caplog.records]
    assert str(models / "other") in message
    assert "is not listed" in message


@pytest.mark.skipif(sys.platform != "linux", reason="becomes another user")
@pytest.mark.parametrize("locked", ["other", "other/transformer", "other/transformer/config.json"])
def test_what_may_not_be_read_is_left_out(monkeypatch, caplog, locked):
    monkeypatch.setattr(subject, "_told", set())
    with tempfile.TemporaryDirectory() as folder:  # pytest's own is closed to the other user
        root = Path(folder)
        make(root / "Helios-Mid")
        make(root / "other")
        root.chmod(0o755)
        (root / locked).chmod(0)
        monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusers", ([folder], {"folder"}))
        user = os.geteuid()
        try:
            if user == 0:  # who may read everything
                os.seteuid(65534)
            assert list_folders() == ["Helios-Mid"]
        finally:
            os.seteuid(user)
            (root / locked).chmod(0o755)


def test_a_root_that_is_not_there_is_no_error(models, monkeypatch, caplog):
    roots = [str(models / "nowhere"), str(models)]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusers", (roots, {"folder"}))
    assert list_folders() == GOOD
    assert not caplog.records


def test_links_in_circles_are_followed_no_further_than_once_round(models):
    for name in "abcdef":
        (models / name).symlink_to(".")
        (models / "BestWishYsh" / name).symlink_to("..")
    assert list_folders() == GOOD


def test_links_to_folders_count_under_each_of_their_names(models, tmp_path):
    """Workflows have them saved."""
    make(tmp_path / "elsewhere" / "Helios-Base")
    (models / "one").symlink_to(tmp_path / "elsewhere" / "Helios-Base")
    (models / "two").symlink_to(tmp_path / "elsewhere" / "Helios-Base")
    (models / "all").symlink_to(tmp_path / "elsewhere")
    assert list_folders() == [*GOOD, "all/Helios-Base", "one", "two"]
    assert find_folder("two") == models / "two"


def test_a_link_to_a_whole_disk_is_searched_in_part(models, monkeypatch, caplog):
    """Folders near the root come first, so that what people have put there is found all the same."""
    monkeypatch.setattr(subject, "MOST_FOLDERS", 50)
    looked = []
    isfile = os.path.isfile
    monkeypatch.setattr(os.path, "isfile", lambda path: looked.append(path) or isfile(path))
    (models / "a").symlink_to("/usr")
    assert list_folders() == GOOD
    assert len([path for path in looked if models in path.parents]) == 50
    assert "more than 50 folders" in caplog.text


def test_depth_is_bounded(models):
    make(models / "a" / "b" / "Helios-Base")
    make(models / "a" / "b" / "c" / "Helios-Base")
    assert list_folders() == [*GOOD, "a/b/Helios-Base"]


def test_a_name_that_the_page_could_not_send_back_is_left_out(models, caplog):
    make(Path(os.fsdecode(os.fsencode(models) + b"/Helios-caf\xe9")))
    assert list_folders() == GOOD
    assert r"Helios-caf\udce9" in caplog.text


@pytest.mark.parametrize("name", ["\ud800", "x\0y", "x" * 10**6, "\x1b[31m", 5, None, ["a"]])
def test_a_name_of_no_folder_is_quoted(models, name):
    with pytest.raises(ValueError, match="There is no Helios folder") as error:
        find_folder(name)
    assert str(error.value).encode().isascii()
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("name", ["BestWishYsh/Helios-Base", "sorted/Helios-Base"])
def test_a_repository_that_is_not_there_is_the_one_to_download(models, name):
    with pytest.raises(ValueError, match="copy of BestWishYsh/Helios-Base there, without .* refresh the page") as error:
        find_folder(name)
    assert "the log" not in str(error.value)
    make(models / "other").write_text("{")
    with pytest.raises(ValueError, match="found: BestWishYsh/Helios-Mid; the log names what could not be read"):
        find_folder(name)
