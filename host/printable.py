"""Nothing leaves our nodes in words that the host cannot print: its log breaks on them, and its worker with the log.

A name with a lone surrogate is enough, as a file name in another encoding has one. Whatever a node raises goes into the
log with the errors that led to it.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from comfy_api.latest import io

from ..helios_core.quoting import printable, quoted

GUARDED = ("define_schema", "validate_inputs", "fingerprint_inputs", "execute")  # what the host calls, and we write


def guarded(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """The node, with every error that it raises and every refusal that it returns made printable."""
    methods: dict[str, Any] = {"__module__": node.__module__}
    for name in GUARDED:
        method = getattr(node, name).__func__
        if method is not getattr(io.ComfyNode, name).__func__:  # the host asks which methods a node has of its own
            methods[name] = classmethod(_guarded(method))
    return type(node.__name__, (node,), methods)


def printable_log(name: str) -> logging.Logger:
    """A logger whose lines can be printed, whatever goes into them."""

    def make_printable(record: logging.LogRecord) -> bool:
        record.msg, record.args = printable(record.getMessage()), ()
        return True

    log = logging.getLogger(name)
    log.addFilter(make_printable)
    return log


log = printable_log(__name__)
_left_out: set[str] = set()  # names that the log has told of


def listable(names: Iterable[str]) -> list[str]:
    """The names that a list of options may hold. The page makes HTML of them, so that one with a tag in it runs."""
    listed = []
    for name in names:
        if printable(name) == name and not {"<", "\n"} & set(name):
            listed.append(name)
        elif name not in _left_out:
            _left_out.add(name)
            log.warning("%s is on no list, since the page cannot show it. Give it a plain name.", quoted(name))
    return listed


def _guarded(method: Callable[..., Any]) -> Callable[..., Any]:
    def checked(result: Any) -> Any:
        return printable(result) if method.__name__ == "validate_inputs" and isinstance(result, str) else result

    if inspect.iscoroutinefunction(method):

        @functools.wraps(method)
        async def call_async(*args: Any, **kwargs: Any) -> Any:
            with _printable_errors():
                return checked(await method(*args, **kwargs))

        call: Callable[..., Any] = call_async
    else:

        @functools.wraps(method)
        def call_now(*args: Any, **kwargs: Any) -> Any:
            with _printable_errors():
                return checked(method(*args, **kwargs))

        call = call_now
    call.__signature__ = inspect.signature(method)  # type: ignore[attr-defined]  # the host reads the inputs' names
    return call


@contextmanager
def _printable_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        for link in _chain(error):
            _make_printable(link)
        raise


def _chain(error: BaseException) -> list[BaseException]:
    """The error and all that led to it."""
    found: list[BaseException] = []
    waiting = [error]
    while waiting:
        link = waiting.pop()
        if link not in found:
            found.append(link)
            waiting += [other for other in (link.__cause__, link.__context__) if other is not None]
    return found


def _make_printable(error: BaseException) -> None:
    text = str(error)
    if printable(text) == text:
        return
    if isinstance(error, OSError) and error.strerror is not None:
        error.strerror = printable(error.strerror)  # its file names are shown escaped as it is
    else:
        error.args = (printable(text),)
