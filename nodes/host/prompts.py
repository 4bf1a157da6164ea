"""Several prompts on one CONDITIONING socket, and prompts from a file in the host's input folder."""

from __future__ import annotations

from pathlib import Path

import folder_paths
import node_helpers
from comfy_api.latest import io

from ...helios_core.video import PromptTrack

TRACK_KEY = "helios_prompts"

# 0.3.75 knows only on and off here, and its page then begins with "randomize".
INCREMENT = getattr(getattr(io, "ControlAfterGenerate", None), "increment", True)


def set_track(positive: list, track: PromptTrack) -> list:
    return node_helpers.conditioning_set_values(positive, {TRACK_KEY: track})


def find_track(positive: list) -> PromptTrack | None:
    """The prompts that a conditioning carries; None for an ordinary one."""
    return next((values[TRACK_KEY] for _, values in positive if TRACK_KEY in values), None)


def text_files() -> list[str]:
    """Names of the text files at the top of the input folder."""
    found = Path(folder_paths.get_input_directory()).glob("[!.]*")
    return sorted(path.name for path in found if path.suffix.lower() == ".txt" and path.is_file())


def read_prompts(name: str) -> list[str]:
    """The lines of a text file in the input folder, without blank ones and those that start with #.

    Raises ValueError for a file that is not there, is not UTF-8 or holds no prompt.
    """
    path = _text_file(name)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is not UTF-8 text: {error.reason} at byte {error.start}. Save it as UTF-8."
        ) from error
    if "\0" in text:  # UTF-16 without its mark decodes
        raise ValueError(f"{name} is not UTF-8 text: it holds zero bytes. Save it as UTF-8.")
    lines = (line.strip() for line in text.split("\n"))
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise ValueError(
            f"{name} holds no prompt. Write one per line; blank lines and lines that start with # are skipped."
        )
    return prompts


def fingerprint(name: str) -> tuple[int, int]:
    """Changes whenever the file does."""
    status = _text_file(name).stat()
    return status.st_mtime_ns, status.st_size


def _text_file(name: str) -> Path:
    folder = Path(folder_paths.get_input_directory())
    if name not in text_files():  # so no path leads out of the folder
        raise ValueError(
            f"There is no text file {name!r} in {folder}. Put a .txt file with one prompt per line there and choose it."
        )
    return folder / name
