"""Official Helios folders: those below the host's models/diffusers, and behind them the pack's own."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import folder_paths

from ...helios_core.checkpoint import read_variant
from ...helios_core.json_file import read_json, read_json_if_there
from ...helios_core.quoting import printable, quoted
from ...helios_core.regular_file import CheckpointError
from ...helios_core.schedule import PRESETS, Schedule, schedule_from_config
from ..printable import listable, printable_log
from . import shipped
from .folder_parts import DOWNLOAD

log = printable_log(__name__)

DEPTH = 3  # <user>/<repository>, and one level for people who sort their models
REPOSITORIES = ("Helios-Distilled", "Helios-Mid", "Helios-Base")  # of BestWishYsh
MOST_FOLDERS = 2000  # that are looked into below one root: a link may lead to a whole disk
# What the loaders read of a folder. Nothing else in it makes latents.
PARTS = ("scheduler", "text_encoder", "tokenizer", "transformer", "vae")
READ = (".json", ".model", ".safetensors")

_told: set[str] = set()  # the page asks for the list again and again


def list_folders() -> list[str]:
    """Names, relative to models/diffusers or the pack's own, of the folders that hold a `transformer/config.json`.

    Never raises, and never takes long: what cannot be read or lies too deep is left out, with a line in the log.
    """
    return list(find_folders())


def find_folder(name: str) -> Path:
    """The folder behind a name of `list_folders`. ValueError for any other name."""
    folders = find_folders()
    if not isinstance(name, str) or name not in folders:
        roots = ", ".join(folder_paths.get_folder_paths("diffusers"))
        found = ", ".join(folders) or "none"
        unread = "; the log names what could not be read" if _told else ""
        wanted = next((repository for repository in REPOSITORIES if str(name).endswith(repository)), REPOSITORIES[0])
        raise ValueError(
            f"There is no Helios folder {quoted(name)} in {printable(roots)} (found: {found}{unread}). Put a copy of "
            f"BestWishYsh/{wanted} there, without transformer_ode/, and refresh the page (R), or choose another."
        )
    return folders[name]


def used_files(folder: Path) -> dict[str, Path]:
    """The files of an official folder that the loaders may read, by their names in it, in the same order every time."""
    files = {"model_index.json": folder / "model_index.json"}
    for part in PARTS:
        where = shipped.part_path(folder, part)
        try:
            names = sorted(name for name in os.listdir(where) if name.endswith(READ) and not name.startswith("."))
        except OSError:  # not there, or not to be read: nothing was loaded from it
            continue
        files |= {f"{part}/{name}": where / name for name in names}
    return files


def read_schedule(folder: Path) -> tuple[Schedule, str | None]:
    """The variant's schedule by the folder's `model_index.json` and `scheduler/scheduler_config.json`.

    Where these ask for something unknown, the variant's usual schedule, and a warning. Raises CheckpointError for a
    folder that does not say which variant it is.
    """
    variant = read_variant(folder)
    if variant is None:
        raise CheckpointError(
            f"{folder} has no model_index.json that names a Helios pipeline. {DOWNLOAD} A transformer alone is for "
            "scripts/convert_checkpoint.py, whose file Helios Model Loader reads."
        )
    scheduler = read_json_if_there(folder / "scheduler" / "scheduler_config.json")
    try:
        return schedule_from_config(variant, scheduler, read_json_if_there(folder / "model_index.json")), None
    except ValueError as error:
        return PRESETS[variant], f"{error} The loader gives out the usual schedule of Helios-{variant.title()}."


def find_folders() -> dict[str, Path]:
    """Name and path of every Helios folder, as of now: the user's first, and of each the distilled ones first."""
    found: dict[str, Path] = {}
    for root in (*map(Path, folder_paths.get_folder_paths("diffusers")), shipped.MODELS):
        for name, path in _search(root):
            found.setdefault(name, path)

    def preference(name: str) -> tuple[bool, bool, str]:
        return shipped.is_shipped(found[name]), "distilled" not in name.lower(), name

    return {name: found[name] for name in sorted(listable(found), key=preference)}


def _search(root: Path) -> Iterator[tuple[str, Path]]:
    """Name and path of the Helios folders below a root. Those nearest to it come first, should they be too many."""
    # A folder, and where it and all those above it really are.
    queue: deque[tuple[Path, tuple[str, ...]]] = deque([(root, (os.path.realpath(root),))])
    looked_into = 0
    while queue:
        if (looked_into := looked_into + 1) > MOST_FOLDERS:
            _tell_once(f"{root} holds more than {MOST_FOLDERS} folders: only these were searched for Helios models.")
            return
        folder, above = queue.popleft()
        config = folder / "transformer" / "config.json"
        if os.path.isfile(config):  # unlike Path.is_file, never raises
            if _may_be_helios(config):
                yield folder.relative_to(root).as_posix(), folder
        elif len(above) <= DEPTH:
            for path in _folders_in(folder):
                if (real := os.path.realpath(path)) not in above:  # or it is a link back, and a way without end
                    queue.append((path, (*above, real)))


def _folders_in(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return sorted(Path(entry.path) for entry in entries if entry.is_dir())
    except OSError as error:
        if not isinstance(error, FileNotFoundError):  # a root need not be there
            _tell_once(f"{folder} cannot be searched for Helios models ({error.strerror}).")
        return []


def _may_be_helios(config: Path) -> bool:
    """Whether this config.json does not name another model; one that cannot be read does not count, and is logged."""
    try:
        return "Helios" in str(read_json(config).get("_class_name", "Helios"))
    except CheckpointError as error:
        _tell_once(f"{config.parents[1]} is not listed among the Helios models: {error}")
        return False


def _tell_once(message: str) -> None:
    if message not in _told:
        _told.add(message)
        log.warning(message)
