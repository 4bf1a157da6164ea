"""Prompts that take over between two chunks: encoded on the node's thread, and given to the guider."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
from torch import Tensor

from ...helios_core.text import MAX_TOKENS
from ...helios_core.video import Turn
from ..messages import Notes
from ..sampling.guider import HeliosGuider
from ..sockets.conditioning import check_conditioning
from ..sockets.prompt_changes import MOST_CHANGES, MOST_CHARACTERS, Change, SteeredPrompts, still_shown
from ..sockets.text_encoding import encode_prompt, tokenize
from .mp4 import prompts_beside
from .plain_files import written_whole
from .run_note import first_prompt, prompt_nodes
from .steering import Steering

KEPT = "helios_prompts/steered"  # in ComfyUI's output folder, and a number
PROMPT_SCHEDULE = "HeliosPromptSchedule"
TEXT_ENCODE = "HeliosTextEncode"  # whose prompts are encoded as those that take over


def check_steerable(clip: Any, positive: list) -> None:
    """Raise ValueError where prompts of `clip` could not take over from the ones of this conditioning."""
    tokenize(clip, "")
    wrong = next((embedding.shape[1] for embedding, _ in positive if embedding.shape[1] != MAX_TOKENS), None)
    if wrong is not None:
        raise ValueError(
            f"The positive conditioning has {wrong} tokens, and a prompt that is to take over on the way has "
            f"{MAX_TOKENS}. Encode it with Helios Text Encode or Helios Prompt Schedule, or disconnect `clip`."
        )


def given_prompts(graph: dict[str, Any], node_id: str) -> SteeredPrompts:
    """What the graph tells of a node's prompts: the first one's text, and those that `steered` lets take over."""
    for kind, inputs, _ in prompt_nodes(graph, node_id):
        steered = inputs.get("steered")
        if kind == PROMPT_SCHEDULE and isinstance(steered, str) and steered.strip():
            return SteeredPrompts.from_json(steered)
    return SteeredPrompts(first_prompt(graph, node_id, of=[TEXT_ENCODE]), 0, {})


def new_kept_prompts() -> Path:
    """A file in ComfyUI's output folder, whose next start empties the temp folder that a streamed video is in."""
    folder, name, count, *_ = folder_paths.get_save_image_path(KEPT, folder_paths.get_output_directory())
    return Path(folder) / f"{name}_{count:05}_.json"


class PromptTurns:
    """Brings into a run what pages ask for, and what its saved chunks were asked for."""

    def __init__(self, guider: HeliosGuider, clip: Any, steering: Steering, notes: Notes, given: SteeredPrompts):
        """given: what the graph tells of the prompts without anybody steering."""
        self.guider, self.clip, self.steering, self.notes, self.given = guider, clip, steering, notes, given

    def replay(self, changes: Mapping[int, Change]) -> None:
        """Before sampling: take up what has taken effect in chunks that are made.

        Raises ValueError where one of them still shows, further chunks are to be made, and there is no `clip`.
        """
        done = self.guider.done
        for position, change in changes.items():
            self.steering.done(position, change)
        shown = still_shown(changes, done)
        if not shown or not self.guider.run.goes_on(done):
            return
        if self.clip is None:
            raise ValueError(
                f"The prompt of the saved chunks was changed on the way (after chunk {max(shown)}), and to go on from "
                "them it has to be encoded again. Connect `clip`, or switch resume off."
            )
        for position, change in shown.items():
            self.guider.turn(Turn(position, self.encode(change), change.transition))

    def take_up(self, position: int) -> bool:
        """Before chunk `position` of the run: let the newest prompt that is waiting take over, if there is one.

        A run that is under way does not end for a prompt that cannot be had: pages and node say why. Returns whether
        the text encoder may have taken the place of other models.
        """
        change = self.steering.take()
        if change is None:
            return False
        try:
            embedding = self.encode(change)
        except (ValueError, comfy.model_management.OOM_EXCEPTION) as error:
            self.steering.refusal = str(error)
            self.notes.warn(f"A prompt was not applied after chunk {position}. {error}")
        else:
            self.guider.turn(Turn(position, embedding, change.transition))
            self.steering.done(position, change)
        return True

    def write_beside(self, video: Path) -> None:
        """The prompts of a video that was steered, for Helios Prompt Schedule: for the page's link, and to be kept."""
        if self.steering.is_asked:
            self.notes.warn("A prompt that was waiting was not applied: no chunk has come after it.")
        run = self.guider.run
        chunks = self.guider.next_index - run.first_index
        self.steering.forget_from(chunks)
        changes = self.steering.applied
        if not changes:
            return
        earlier = {position: change for position, change in self.given.changes.items() if position < min(changes)}
        prompts = SteeredPrompts(self.given.begins_with, chunks, {**earlier, **changes})
        text = prompts.to_json(run.rng.initial_seed())
        try:
            for file in (prompts_beside(video), kept := new_kept_prompts()):
                with written_whole(file, part := file.with_suffix(".json.part")):
                    part.write_text(text, encoding="utf-8")
        except OSError as error:  # the video is there all the same
            self.notes.warn(f"The prompts that took over could not be written to {error.filename} ({error.strerror}).")
            return
        taken = f"{len(changes)}, after {len(earlier)} that `steered` has now" if earlier else f"{len(changes)}"
        self.notes.inform(
            f"Prompts that took over: {taken}. They are in {kept}, for `steered` of Helios Prompt Schedule."
        )
        if len(prompts.changes) > MOST_CHANGES or len(text) > MOST_CHARACTERS:
            self.notes.warn(
                f"`steered` does not take so many: {len(prompts.changes)} prompts of at most {MOST_CHANGES}, "
                f"{len(text)} characters of at most {MOST_CHARACTERS}. Leave some out before you paste them."
            )

    def encode(self, change: Change) -> Tensor:
        """(1, 512, D). Raises ValueError for a text encoder that does not fit the model, or does not work."""
        [embedding, _], *_ = encode_prompt(self.clip, change.prompt, warn=self.notes.warn)
        width = self.guider.model_patcher.model.diffusion_model.config.text_dim
        if embedding.shape[-1] != width:
            raise ValueError(
                f"The text encoder on `clip` is {embedding.shape[-1]} wide, the model expects {width}. Connect the one "
                "that the first prompt was encoded with."
            )
        check_conditioning([[embedding, {}]], "clip")
        return embedding
