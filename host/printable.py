"""Errors, log lines and names in lists, made printable before the host has them.

Its log breaks on what cannot be printed, and its worker with the log. A name with a lone surrogate is enough, as a file
name in another encoding has one. Whatever a node raises goes into the log with the errors that led to it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from ..helios_core.quoting import printable, quoted


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


@contextmanager
def printable_errors() -> Iterator[None]:
    """Make an error that passes, and all that led to it, printable."""
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
