"""The files that the text in a node's input names, and what tells whether they are still the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import folder_paths

from ...helios_core.regular_file import FileFacts, facts_of
from . import official
from .single_file import full_path


def fingerprint(name: Any) -> str:
    """Changes with the files that a loader's input names; the host loads anew where it has."""
    return NamedFiles().fingerprint(name)


class NamedFiles:
    """Every file that a text may name: in the input folder, a model folder, or an official folder."""

    def __init__(self) -> None:
        self.official = official.find_folders()

    def of(self, text: str) -> Iterator[tuple[str, str, FileFacts]]:
        """(kind of folder, name, facts) of each file; none for a text that names none."""
        if folder := self.official.get(text):
            for name, path in official.used_files(folder).items():
                if facts := facts_of(path):  # a download that was cut off leaves links to nothing
                    yield "diffusers", name, facts
            return
        if not text or "\0" in text:
            return
        name, folder = folder_paths.annotated_filepath(text)
        # Newer hosts (0.33) join the two only within the folder, and some nodes read a file from anywhere.
        if facts := facts_of(Path(folder or folder_paths.get_input_directory(), name)):
            yield "input", text, facts
        for kind in sorted(folder_paths.folder_names_and_paths):
            if (found := full_path(kind, text)) and (facts := facts_of(Path(found))):
                yield kind, text, facts

    def lasting(self, text: str) -> list[Any]:
        """The files' facts for a key, without inodes: on some file systems their numbers change with a restart."""
        return [[kind, name, facts.size, facts.mtime_ns] for kind, name, facts in self.of(text)]

    def fingerprint(self, text: Any) -> str:
        """Everything about the files that `check_unchanged` goes by."""
        files = self.of(text) if isinstance(text, str) else ()
        return sha256([[kind, name, facts.size, facts.mtime_ns, facts.inode] for kind, name, facts in files])


def sha256(value: Any) -> str:
    """64 hexadecimal digits of what JSON can say."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
