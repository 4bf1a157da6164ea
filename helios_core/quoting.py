"""Text that comes from a file, a name or a person, on its way into a message.

Such text may hold anything: escape codes that a terminal obeys, a lone surrogate that no encoder takes, a megabyte.
"""

from __future__ import annotations

import reprlib
import unicodedata
from collections.abc import Collection
from pathlib import PurePath
from typing import TypeVar

LONGEST = 4000  # characters of a whole message
SHOWN = 10  # names that a message lists before it only counts
JOINERS = "\u200c\u200d"  # unprintable to Python, but Persian and many emoji are not readable without them

Error = TypeVar("Error", bound=Exception)

_repr = reprlib.Repr()  # of a list or an object of any size and depth
_repr.maxstring = _repr.maxother = 80


def known_by_its_name(kind: type[Error]) -> type[Error]:
    """An error that people read: ComfyUI shows a class's module before its message, and for a pack that is a path."""
    kind.__module__ = "builtins"
    return kind


def quoted(text: object, limit: int = 80) -> str:
    """A name or a text in quotes, on one line; any other value as Python writes it. Printable, cut after `limit`."""
    if not isinstance(text, str | PurePath):
        return _escaped(_repr.repr(text), limit)
    text = str(text)
    mark = '"' if "'" in text[:limit] and '"' not in text[:limit] else "'"
    return mark + _escaped(text, limit) + mark


def printable(message: object, limit: int = LONGEST) -> str:
    """A whole message of one or more lines, whatever went into it. Printable, cut after `limit`."""
    return _escaped(str(message), limit, kept="\n")


def some(names: Collection[object], total: int | None = None) -> str:
    """Names for a message: the first, and how many more there are of `total`, where `names` is only a part of all."""
    shown = ", ".join(printable(name, limit=160) for name in list(names)[:SHOWN])
    more = (total or len(names)) - SHOWN
    return shown + (f", and {more} more" if more > 0 else "")


def _escaped(text: str, limit: int, kept: str = "") -> str:
    shown: list[str] = []
    length = 0
    for character in text:
        piece = character if _readable(character) or character in kept else _escape(character)
        length += len(piece)
        if length > limit:
            return "".join(shown) + "..."
        shown.append(piece)
    return "".join(shown)


def _readable(character: str) -> bool:
    return character.isprintable() or character in JOINERS or unicodedata.category(character) == "Zs"  # spaces


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
