"""Prompts that took over while a video was made, by the chunks before them: as JSON that makes the same video again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...helios_core.json_file import parse_json
from ...helios_core.quoting import quoted
from .text_encoding import MAX_CHARACTERS

FORMAT = "helios prompts 1"
MOST_CHUNKS = 99_999
LONGEST_TRANSITION = 999
MOST_CHANGES = 2_000
MOST_CHARACTERS = 16 * 2**20  # of the JSON


@dataclass(frozen=True)
class Change:
    """Another prompt, as it was asked for. It is alone after `transition` chunks; 0: at once, as 1."""

    prompt: str
    transition: int

    def __post_init__(self) -> None:
        if not _text(self.prompt).strip():
            raise ValueError(f"A prompt that is to take over has at least a word, got {quoted(self.prompt)}.")
        _whole_number("A transition", self.transition, 0, LONGEST_TRANSITION)

    def as_dict(self) -> dict[str, Any]:
        return {"prompt": self.prompt, "transition": self.transition}

    @classmethod
    def from_dict(cls, values: Any) -> Change:
        """Raises ValueError for anything but what `as_dict` gives."""
        if not isinstance(values, dict) or values.keys() != {"prompt", "transition"}:
            raise ValueError(f"A change has a prompt and a transition, got {quoted(values)}.")
        return cls(**values)


@dataclass(frozen=True)
class SteeredPrompts:
    """All prompts of a video that was steered."""

    begins_with: str | None  # None where the graph does not tell
    chunks: int  # of the video
    changes: Mapping[int, Change]  # by how many chunks come before

    def to_json(self, seed: int) -> str:
        """One line. The seed is there to be read, and to be set by hand."""
        changes = [{"after_chunk": after, **self.changes[after].as_dict()} for after in sorted(self.changes)]
        values = {"format": FORMAT, "seed": seed, "chunks": self.chunks, "begins_with": self.begins_with}
        return json.dumps({**values, "prompts": changes}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> SteeredPrompts:
        """Raises ValueError for what is none."""
        try:
            if len(text) > MOST_CHARACTERS:
                raise ValueError(f"it has {len(text)} characters of at most {MOST_CHARACTERS}")
            values = parse_json(text.encode())
            if values.get("format") != FORMAT:
                raise ValueError(f"its format is {quoted(values.get('format'))} instead of {quoted(FORMAT)}")
            begins_with, changes = values.get("begins_with"), values.get("prompts")
            if begins_with is not None:
                _text(begins_with)
            if not isinstance(changes, list):
                raise ValueError("`prompts` is no list")
            if len(changes) > MOST_CHANGES:
                raise ValueError(f"it has {len(changes)} prompts of at most {MOST_CHANGES}")
            chunks = _whole_number("`chunks`", values.get("chunks"), 1, MOST_CHUNKS)
            return cls(begins_with, chunks, _by_chunk(changes))
        except ValueError as error:
            reason = str(error).rstrip(".")
            raise ValueError(
                f"`steered` holds no prompts of a steered video: {reason}. Paste what is in a .json file of "
                "output/helios_prompts, where Helios Stream Video writes them, or leave it empty."
            ) from error


def _by_chunk(changes: list[Any]) -> dict[int, Change]:
    found: dict[int, Change] = {}
    for values in changes:
        if not isinstance(values, dict):
            raise ValueError(f"one of `prompts` is {quoted(values)}")
        after = _whole_number("`after_chunk`", values.get("after_chunk"), 0, MOST_CHUNKS)
        if after in found:
            raise ValueError(f"two prompts come after chunk {after}")
        found[after] = Change.from_dict({key: value for key, value in values.items() if key != "after_chunk"})
    return dict(sorted(found.items()))


def still_shown(changes: Mapping[int, Change], chunk: int) -> dict[int, Change]:
    """Those of the changes that chunk `chunk` still shows, were it the next: the newest that was alone once, and all
    that came after it.
    """
    shown: dict[int, Change] = {}
    end = chunk
    for start in sorted((start for start in changes if start < chunk), reverse=True):
        shown[start] = changes[start]
        if end - start >= changes[start].transition:
            break
        end = start
    return dict(sorted(shown.items()))


def _text(prompt: Any) -> str:
    """The prompt, which may be empty where a video begins. Raises ValueError for what is none."""
    if not isinstance(prompt, str) or len(prompt) > MAX_CHARACTERS:
        raise ValueError(f"A prompt is a text of at most {MAX_CHARACTERS} characters, got {quoted(prompt)}.")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError("A prompt is text that can be written as UTF-8.") from error
    return prompt


def _whole_number(name: str, value: Any, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} is a whole number from {low} to {high}, got {quoted(value)}.")
    return value
