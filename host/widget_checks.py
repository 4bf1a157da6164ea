"""Whether the values that a node is given, typed in or over links, are such as its widgets take."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any

from comfy_api.latest import io

from ..helios_core.quoting import quoted


def check_widgets(schema: io.Schema, values: Mapping[str, Any]) -> None:
    """Raise ValueError for the first value that its widget could not have; called before each node's work.

    The host looks at what is typed in, and there not at NaN and at the values of a V3 combo, and never at what comes
    over a link.
    """
    for widget in schema.inputs:
        if widget.id not in values:
            continue
        value = values[widget.id]
        if expected := _expected(widget, value):
            raise ValueError(
                f"`{widget.id}` is {quoted(value)}; expected {expected}. Correct the widget, or the node that is "
                "connected to it."
            )
        # The host (0.3.75) lets any value of a V3 combo pass. One without a default lists files, and its node looks
        # for the file itself: it may say more, and the list may be older than the file.
        if isinstance(widget, io.Combo.Input) and widget.default is not None and value not in widget.options:
            raise ValueError(f"{widget.id} must be one of {', '.join(widget.options)}, got {quoted(value)}.")


async def found(find: Callable[[Any], object], name: Any) -> bool | str:
    """What `validate_inputs` answers for a widget that names a file: True, or why `find` raises ValueError for it.

    So that the sentence is ours: newer hosts (0.24) refuse what is not on the list in theirs, unless a node answers.
    """
    if name is None:  # linked, not known yet
        return True
    try:
        await asyncio.to_thread(find, name)  # the host's event loop serves everybody
    except ValueError as error:
        return str(error)
    return True


def _expected(widget: Any, value: Any) -> str | None:
    """What a widget takes instead of this value; None if it takes it, or is no widget."""
    if isinstance(widget, io.Int.Input):
        fits = isinstance(value, Integral) and not isinstance(value, bool) and widget.min <= value <= widget.max
        return None if fits else f"a whole number from {widget.min} to {widget.max}"
    if isinstance(widget, io.Float.Input):
        fits = isinstance(value, Real) and widget.min <= value <= widget.max  # NaN is in no range
        return None if fits else f"a number from {widget.min:g} to {widget.max:g}"
    if isinstance(widget, io.Boolean.Input):
        return None if isinstance(value, Integral) else "true or false"
    if isinstance(widget, io.Combo.Input):
        return None if isinstance(value, str) else "one of its choices"
    if isinstance(widget, io.String.Input):
        return None if isinstance(value, str) and _encodes(value) else "text that can be written as UTF-8"
    return None


def _encodes(text: str) -> bool:
    """Lone surrogates, as JSON can spell them, are no text: neither tokenizers nor logs take them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
