"""`resume` of Helios Stream Video: a sampling goes on after the chunks that an earlier one has saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from comfy.model_management import InterruptProcessingException

from ..messages import Notes
from ..sampling.guider import HeliosGuider
from ..sockets.prompt_changes import MOST_CHUNKS
from .graph_key import graph_key
from .run_folder import count_others
from .run_note import about, first_prompt
from .saved_chunks import Kind, SavedRun, open_run


@contextmanager
def pick_up(guider: HeliosGuider, prompt: dict[str, Any], node_id: str, notes: Notes) -> Iterator[SavedRun | None]:
    """Let the guider go on after the chunks that are saved for this node's graph; yields where to save the next ones.

    Yields None where the graph cannot be known again. Raises ValueError where another process is making the same video.
    """
    if node_id not in (prompt or {}):
        notes.warn("resume does not work on a node that another node has made: nothing is saved, nothing resumed.")
        yield None
        return
    run = guider.run
    endless = run.more is not None
    kind = Kind.after(guider.memory, watched=run.schedule.anti_drift is not None)
    note = about(run.chunk_shape, run.chunks, run.rng.initial_seed(), first_prompt(prompt, node_id))
    with open_run(graph_key(prompt, node_id), kind, note) as saved:
        done, problem = saved.count(MOST_CHUNKS if endless else run.chunks)
        if problem:
            notes.warn(f"{problem} It is not used, and made again.")
        if done:
            last = saved.load(done - 1)
            guider.resume(done, last.memory, last.rng_state)
            if last.finished:
                run = guider.run = replace(run, chunks=done, more=None)
        if not run.goes_on(done):
            notes.inform(f"All chunks ({done}) were saved: nothing is sampled, the video is encoded again.")
        elif done:
            notes.inform(f"Resumed after chunk {done}{'' if endless else f' of {run.chunks}'}.")
        elif others := count_others(saved.folder):
            notes.inform(
                f"Starts anew: no chunk is saved for this graph ({others} other run{'s are' if others > 1 else ' is'} "
                "kept). To resume, everything upstream must be as it was: prompts, frames, seed, files."
            )
        try:
            yield saved
        except InterruptProcessingException:
            if made := len(saved.digests):
                many = f"{made} chunks are" if made > 1 else "1 chunk is"
                notes.inform(f"Interrupted: {many} saved. Run goes on after that, with the same seed and inputs.")
            raise
