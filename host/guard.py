"""What stands around every node: checked widgets, one sentence for a lack of memory, errors that can be printed."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from comfy_api.latest import io

from ..helios_core.quoting import printable
from .out_of_memory import memory_errors
from .printable import printable_errors
from .widget_checks import check_widgets

GUARDED = ("define_schema", "validate_inputs", "fingerprint_inputs", "execute")  # what the host calls, and we write


def guarded(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """The node as the host is given it; called once for each, in nodes/__init__.

    Around `execute`: ValueError for a value that its widget could not have, and one sentence where memory runs out.
    Around all that the host calls: every error that is raised and every refusal that is returned can be printed.
    """
    methods: dict[str, Any] = {"__module__": node.__module__}
    for name in GUARDED:
        method = getattr(node, name).__func__
        if method is not getattr(io.ComfyNode, name).__func__:  # the host asks which methods a node has of its own
            work = _checked(method) if name == "execute" else method
            methods[name] = classmethod(_printable(work))
    return type(node.__name__, (node,), methods)


def _checked(execute: Callable[..., io.NodeOutput]) -> Callable[..., io.NodeOutput]:
    signature = inspect.signature(execute)
    schema: io.Schema | None = None  # made once: it lists folders, and what those hold is not checked here
    many = [p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]  # such as **slots

    @functools.wraps(execute)
    def run(cls: type[io.ComfyNode], *args: Any, **kwargs: Any) -> io.NodeOutput:
        nonlocal schema
        values = signature.bind(cls, *args, **kwargs).arguments
        for name in many:
            values |= values.get(name, {})
        schema = schema or cls.define_schema()
        check_widgets(schema, values)
        with memory_errors(schema.display_name):
            return execute(cls, *args, **kwargs)

    return run


def _printable(method: Callable[..., Any]) -> Callable[..., Any]:
    def shown(result: Any) -> Any:
        return printable(result) if method.__name__ == "validate_inputs" and isinstance(result, str) else result

    if inspect.iscoroutinefunction(method):

        @functools.wraps(method)
        async def call_async(*args: Any, **kwargs: Any) -> Any:
            with printable_errors():
                return shown(await method(*args, **kwargs))

        call: Callable[..., Any] = call_async
    else:

        @functools.wraps(method)
        def call_now(*args: Any, **kwargs: Any) -> Any:
            with printable_errors():
                return shown(method(*args, **kwargs))

        call = call_now
    call.__signature__ = inspect.signature(method)  # type: ignore[attr-defined]  # the host reads the inputs' names
    return call
