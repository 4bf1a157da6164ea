"""What a node says: warnings and short notes on it, and in the log."""

from __future__ import annotations

import re
import sys
from typing import Any

from ..helios_core.quoting import printable
from .printable import printable_log

log = printable_log(__name__)

WORD_JOINER = "\N{WORD JOINER}"  # which nobody sees
NOTHING = WORD_JOINER  # takes a message back, also in web/helios_notes.js: pages pass over an empty one
# What HTML takes for a tag or an entity, and a page for a link, or for its own mark on the way to one.
READ_OTHERWISE = re.compile(r"<(?=[A-Za-z/!?])|&(?=[#A-Za-z])|\[(?=\[)|_(?=_LNK)")

_shown: set[str] = set()  # nodes that show a message


class Notes:
    """What a run says on its node, line by line; what an earlier run has said there goes away."""

    def __init__(self, node_id: str | None):
        self.node_id = node_id
        self.lines: list[str] = []
        if node_id in _shown:
            _shown.discard(node_id)
            tell("", node_id)

    def warn(self, *messages: str | None) -> None:
        """None is no message: what a check returns where all is well."""
        for message in filter(None, messages):
            log.warning(message)
            self._show(message)

    def inform(self, message: str) -> None:
        log.info(message)
        self._show(message)

    def _show(self, message: str) -> None:
        self.lines.append(message)
        tell("\n".join(self.lines), self.node_id)
        if self.node_id is not None:
            _shown.add(self.node_id)


def tell(message: str, node_id: str | None) -> None:
    """In a running server, write a message onto the node, as the text it is."""
    instance = running_server()
    if instance is not None and node_id is not None:
        instance.send_progress_text(_as_text(printable(message)) or NOTHING, node_id)


def running_server() -> Any | None:
    """The host's PromptServer; None where nodes run outside of a server."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def _as_text(message: str) -> str:
    """What shows as this text in every page: older ones (1.32, 1.49) put it into their HTML, newer ones (1.58) do not,
    and both make a link of `[[label|address]]`. An address with `&name=` is a link up to there only."""
    return READ_OTHERWISE.sub(rf"\g<0>{WORD_JOINER}", message)
