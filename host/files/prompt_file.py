"""Prompts from a text file in the host's input folder."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths

from ...helios_core.quoting import quoted
from ..printable import listable

MAX_BYTES = 10_000_000  # of a prompt file: 4000 of the longest prompts that Helios reads


def text_files() -> list[str]:
    """Names of the text files at the top of the input folder."""
    folder = Path(folder_paths.get_input_directory())
    return sorted(listable(path.name for path in folder.glob("*") if _is_text_file(path)))


def read_prompts(name: str) -> list[str]:
    """The lines of a text file in the input folder, without blank ones and those that start with #.

    Raises ValueError for a file that is not there, is too large, is not UTF-8 or holds no prompt.
    """
    try:
        text = _read(_text_file(name), name).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{quoted(name)} is not UTF-8 text: {error.reason} at byte {error.start}. Save it as UTF-8."
        ) from error
    if "\0" in text:  # UTF-16 without its mark decodes
        raise ValueError(f"{quoted(name)} is not UTF-8 text: it holds zero bytes. Save it as UTF-8.")
    lines = (line.strip() for line in text.split("\n"))
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise ValueError(
            f"{quoted(name)} holds no prompt. Write one per line; blank lines and lines that start with # are skipped."
        )
    return prompts


def fingerprint(name: str) -> tuple[int, int]:
    """Changes whenever the file does."""
    status = _text_file(name).stat()
    return status.st_mtime_ns, status.st_size


def _text_file(name: str) -> Path:
    folder = Path(folder_paths.get_input_directory())
    inside = isinstance(name, str) and Path(name).name == name  # no path leads out of the folder
    if not inside or not _is_text_file(folder / name):
        raise ValueError(
            f"There is no text file {quoted(name)} in {folder}. Put a .txt file with one prompt per line there and "
            "choose it."
        )
    return folder / name


def _is_text_file(path: Path) -> bool:
    """Links count as what they lead to, as with the host's own files; pipes and devices never end."""
    # Unlike Path.is_file, os.path.isfile never raises, whatever the name.
    return path.suffix.lower() == ".txt" and not path.name.startswith(".") and os.path.isfile(path)


def _read(path: Path, name: str) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{quoted(name)} cannot be read: {error.strerror}. Choose another file.") from error
    if len(data) > MAX_BYTES:
        raise ValueError(
            f"{quoted(name)} is larger than {MAX_BYTES // 1_000_000} MB: no list of prompts, or one to split."
        )
    return data
