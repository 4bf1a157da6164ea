"""What nodes made for other models put on a MODEL, and Helios has no place for: refused, not ignored."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import comfy.utils

# Options by their keys, which tell no node: the node that sets each, and what it changes.
MARKS = {
    "rope_options": ("ScaleROPE", "the scale of positions"),
    "ar_config": ("ARVideoI2V", "how another sampler begins"),
}
NETWORK = "HeliosNetwork"  # as errors of Python name ours
OURS = "dit"  # the one group of replacements that `HeliosNetwork` asks, for its blocks


def check_foreign(options: Mapping[str, Any]) -> None:
    """Raise ValueError for transformer_options that Helios would not heed."""
    for node, what in _unheeded(options):
        raise ValueError(_refusal(node, what))


def check_model_options(node: str, patcher: Any) -> None:
    """Raise ValueError, with the name of the node that got it, for a MODEL whose options Helios would not heed."""
    if (handler := patcher.model_options.get("context_handler")) is not None:
        raise ValueError(
            f"{node} does not work with context windows ({type(handler).__name__}): Helios makes a video of any length "
            "in chunks of 9 latent frames, each seeing those before it. Take the Context Windows node out."
        )
    check_foreign(patcher.model_options.get("transformer_options", {}))
    for path in patcher.object_patches:
        try:
            comfy.utils.get_attr(patcher.model, path)
        except AttributeError as error:
            raise ValueError(
                f"A node before {node} replaces {path}, which Helios does not have: it was made for other models. Take "
                "it out of the graph."
            ) from error


@contextmanager
def refusing_by_name(options: Mapping[str, Any]) -> Iterator[None]:
    """Around a step: where a node's function looks for a part of the network in vain, a ValueError that names the node.

    As TeaCache and its like do, for a `forward_orig`; the error that they end in shows all of the network.
    """
    try:
        yield
    except AttributeError as error:
        function, part = options.get("model_function_wrapper"), re.search(r"attribute '(\w+)'", str(error))
        if function is None or part is None or NETWORK not in str(error):
            raise
        raise ValueError(_refusal(node_of(function), f"{part[1]} of a network")) from error


def node_of(function: Any) -> str:
    """The class that a function or an object was made in, which for most nodes is the node's."""
    made = function if hasattr(function, "__qualname__") else type(function)
    file = re.split(r"[./\\]", made.__module__)[-1]  # the host calls a node's module by its path
    return f"{made.__qualname__.split('.')[0]} ({file})"


def _refusal(node: str, what: str) -> str:
    return f"{node} changes {what}, which Helios does not have: it was made for other models. Take it out of the graph."


def _unheeded(options: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The node, as far as it can be told, and what it changes."""
    yield from (mark for key, mark in MARKS.items() if options.get(key))
    for name, functions in options.get("patches", {}).items():
        for function in functions:
            yield node_of(function), f"parts of a network ({name})"
    for group, functions in options.get("patches_replace", {}).items():
        for function in functions.values() if group != OURS else ():
            yield node_of(function), f"parts of a network ({group})"
