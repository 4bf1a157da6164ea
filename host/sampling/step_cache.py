"""ComfyUI's EasyCache and LazyCache, which skip a step that would change little by what the steps before it changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

KEY = "easycache"  # of both, in transformer_options


def restart_step_cache(options: dict[str, Any]) -> None:
    """Begin a stage of a chunk with a fresh cache in these model_options: it starts from other noise, in another size.

    Not by the cache's own `reset`, which leaves it a rate of 0 where a fresh one has none (0.3.75).
    """
    cache = options["transformer_options"].get(KEY)
    if cache is None:
        return
    fresh = cache.clone()
    fresh.start_t, fresh.end_t = cache.start_t, cache.end_t  # prepared by the host for a run
    fresh.total_steps_skipped = cache.total_steps_skipped
    options["transformer_options"][KEY] = fresh


@contextmanager
def counting_skipped_steps(given: dict[str, Any], options: dict[str, Any], made: Callable[[], int]) -> Iterator[None]:
    """While `options` are used in place of the model_options that the host has `given`.

    At the end it compares the steps skipped, by the cache there, with those of one chunk: it is told their mean over
    the chunks that are made by then.
    """
    try:
        yield
    finally:
        if (cache := options["transformer_options"].get(KEY)) is not None and (chunks := made()):
            given["transformer_options"][KEY].total_steps_skipped = round(cache.total_steps_skipped / chunks)
