"""Sampling inside the host: its guider loads models, hooks and wrappers once, the core's loop does the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import comfy.conds
import comfy.model_management
import comfy.model_patcher
import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor

from ...helios_core.generate import Chunk, PredictFlow, Run, Step, generate
from ...helios_core.history import History, Memory
from ...helios_core.regular_file import check_unchanged
from ...helios_core.schedule import TRAIN_STEPS, stages
from ...helios_core.video import PromptTrack, Turn
from ..compat import free_memory
from ..model.base_model import MEMORY_KEY, TEXT_CACHED_KEY, history_conds
from ..model.offload_patcher import release
from ..model.run_cache import CACHE_KEY, RunCache, can_cache, text_bytes_per_token
from ..progress import SamplingProgress
from ..sockets.conditioning import TRACK_KEY
from .bound_chunk import STEP_KEY, BoundChunk, BoundStep
from .step_cache import counting_skipped_steps, restart_step_cache


class HeliosGuider(comfy.samplers.CFGGuider):
    """Denoises a run's chunks in one pass of the host's sampling machinery.

    Each finished chunk goes to a consumer, and nothing else of it is kept. Afterwards `memory` (on the CPU) is what a
    next chunk would follow on.
    """

    original_conds: dict[str, list[dict[str, Any]]]  # by the host: as they were set, per prompt
    conds: dict[str, list[dict[str, Any]]]  # by the host: processed
    loaded_models: list[Any]  # by the host: what it has loaded beside the model
    on_chunk: Callable[[Chunk], None]
    on_step: Callable[[], None]
    before_chunk: Callable[[int], None]
    cache: RunCache | None = None  # while it denoises
    stage_shape: torch.Size | None = None  # of the latents of the last step in this chunk

    def __init__(self, model_patcher: Any, run: Run):
        super().__init__(model_patcher)
        self.set_cfg(run.schedule.guidance_scale)
        self.run, self.memory = run, run.memory
        self.done = 0  # chunks that an earlier run has made
        self.next_index = run.first_index  # of the chunk that comes next in the video
        self.turns: list[Turn] = []  # that are not taken yet

    @property
    def patchers(self) -> list[Any]:
        """The MODEL, and its copies on other cards (MultiGPU CFG Split of 0.33)."""
        return [self.model_patcher, *self.model_patcher.get_additional_models_with_key("multigpu")]

    def resume(self, done: int, memory: Memory, rng_state: Tensor) -> None:
        """Take the first `done` chunks for made; memory and rng_state are as they were after the last of them."""
        self.done, self.memory, self.next_index = done, memory, self.run.first_index + done
        self.run.rng.set_state(rng_state)

    def turn(self, turn: Turn) -> None:
        """With chunk `turn.chunk` of this run, which is not begun yet, another prompt takes over from the positive."""
        self.turns.append(turn)

    def denoise(
        self,
        on_chunk: Callable[[Chunk], None],
        beside: Sequence[Any] = (),
        on_step: Callable[[], None] = lambda: None,
        before_chunk: Callable[[int], None] = lambda position: None,
    ) -> None:
        """Denoise all chunks that are not done; on_chunk is called with each, normalised, on the model's device.

        The patchers `beside` are loaded together with the model. on_step is called after each step, before_chunk with
        the number of a chunk in this run before it is begun.
        """
        self.on_chunk, self.on_step, self.before_chunk = on_chunk, on_step, before_chunk
        check_unchanged(self.model_patcher.model.files)
        # The host sizes memory by the noise it is given: one chunk, however long the video. Noise is drawn in the loop.
        noise = torch.zeros(self.run.chunk_shape)
        plan = stages(self.run.schedule, noise.shape[-2], noise.shape[-1], first_chunk=False)
        sigmas = torch.cat([*(stage.timesteps / TRAIN_STEPS for stage in plan), torch.zeros(1)]).float()
        given = self.original_conds
        self.original_conds = self.sized_conds(beside)
        try:
            self.sample(noise, torch.zeros_like(noise), None, sigmas, seed=self.run.rng.initial_seed())
        finally:
            self.original_conds = given
            for patcher in self.patchers:
                release(patcher)
            self.memory = self.memory.to("cpu")

    def inner_sample(
        self, noise, latent_image, device, sampler, sigmas, denoise_mask, callback, disable_pbar, seed, **newer
    ) -> Tensor:
        """Where the host would run a sampler on the loaded model; called by `CFGGuider.sample`."""
        self.conds = comfy.samplers.process_conds(
            self.inner_model, noise, self.conds, device, latent_image, denoise_mask, seed, **newer
        )
        for cond in (cond for conds in self.conds.values() for cond in conds if TRACK_KEY not in cond):
            # Up once: the host would send it to the device with every step.
            cond["model_conds"]["c_crossattn"] = comfy.conds.CONDCrossAttn(cond["cross_attn"].to(device))
        self.options = comfy.model_patcher.create_model_options_clone(self.model_options)
        self.options.setdefault("transformer_options", {})["sample_sigmas"] = sigmas

        run = self.run
        progress = SamplingProgress(self.model_patcher, run.steps(run.chunks), done=run.steps(self.done))

        def on_step(step: Step) -> None:
            progress(step)
            self.on_step()

        loop = generate(self.bind_chunk, run.after(self.done, self.memory.to(device)), on_step)
        begun = self.next_index
        counting = counting_skipped_steps(self.model_options, self.options, lambda: self.next_index - begun)
        with self.caching(device), counting:
            for chunk in loop:
                self.memory, self.next_index = chunk.memory, chunk.index + 1
                self.on_chunk(chunk)
        return latent_image  # the host wants one back; the chunks are with their consumer

    def sizes(self, name: str) -> dict[str, Any]:
        """What the host is to count for the conds of this name, "positive" or "negative", when it sizes memory."""
        used = name == "positive" or self.run.schedule.guided
        cached = used and can_cache(self.model_patcher, self.model_options, self.original_conds)
        return {MEMORY_KEY: self.memory, TEXT_CACHED_KEY: cached}

    def sized_conds(self, beside: Sequence[Any] = ()) -> dict[str, list[dict[str, Any]]]:
        """The conds with what the host is to count and to load for them: the patchers `beside` too."""
        return {
            name: [
                {**cond, **self.sizes(name), "additional_models": [*cond.get("additional_models", []), *beside]}
                for cond in conds
            ]
            for name, conds in self.original_conds.items()
        }

    @contextmanager
    def caching(self, device: torch.device) -> Iterator[None]:
        """Compute once what repeats, for the length of a run; prompts only if there is room for them."""
        if not can_cache(self.model_patcher, self.options, self.conds):
            yield
            return
        fits = self.sampling_memory()[0] <= free_memory(self.model_patcher, device)
        prompts = sum(cond["cross_attn"].shape[1] for conds in self.conds.values() for cond in conds)
        model = self.inner_model
        dtype = model.manual_cast_dtype or model.get_dtype()
        limit = prompts * self.run.chunk_shape[0] * text_bytes_per_token(model.diffusion_model, dtype) if fits else 0
        self.cache = RunCache(limit)
        self.options["transformer_options"][CACHE_KEY] = self.cache
        try:
            yield
        finally:
            self.cache = None
            del self.options["transformer_options"][CACHE_KEY]

    def sampling_memory(self) -> tuple[float, float]:
        """Bytes that predictions of a chunk need, and the least they get by with, by the host's way of estimating."""
        return comfy.sampler_helpers.estimate_memory(self.model_patcher, self.run.chunk_shape, self.sized_conds())

    def load_again(self) -> None:
        """Load the model once more, between two chunks, where something else may have taken its place."""
        required, minimum = self.sampling_memory()
        comfy.model_management.load_models_gpu(
            [self.model_patcher, *self.loaded_models], memory_required=required, minimum_memory_required=minimum
        )

    def bind_chunk(self, index: int, history: History) -> PredictFlow:
        """Predict with this history and the chunk's prompt: the host's conds, with these in their model_conds."""
        check_unchanged(self.model_patcher.model.files)
        self.before_chunk(index - self.run.first_index)
        self.take_turns()
        extra = history_conds(history, self.memory.layout)
        prompts = {}  # where they lie in memory: comparing them on the device would wait for it

        def with_chunk(cond: dict[str, Any]) -> dict[str, Any]:
            model_conds = {**cond["model_conds"], **extra}
            prompts[cond["uuid"]] = cond["cross_attn"]
            if TRACK_KEY in cond:
                prompts[cond["uuid"]] = prompt = cond[TRACK_KEY].at(index - self.run.first_index)
                model_conds["c_crossattn"] = comfy.conds.CONDCrossAttn(prompt.to(history.short.device))
            return {**cond, "model_conds": model_conds}

        conds = {name: [with_chunk(cond) for cond in conds] for name, conds in self.conds.items()}
        if self.cache is not None:
            self.cache.start_chunk(prompts)
        self.restart_trajectory()
        return BoundChunk(self, conds, extra)

    def take_turns(self) -> None:
        """Every positive prompt goes over to those that take over, each from its own."""
        turns, self.turns = self.turns, []
        for cond in self.conds["positive"]:
            for turn in turns:
                track = cond.get(TRACK_KEY) or PromptTrack((cond["cross_attn"],), (1,), 0)
                cond[TRACK_KEY] = track.turned(replace(turn, embedding=turn.embedding.to(cond["cross_attn"])))

    def restart_trajectory(self) -> None:
        """Every chunk is denoised from noise again: what the host keeps along the way starts over."""
        for conds in self.conds.values():
            for cond in conds:
                if cond.get("hooks"):
                    cond["hooks"].reset()
        for patcher in self.patchers:
            patcher.model.current_patcher.clear_cached_hook_weights()
        self.stage_shape = None

    def enter_stage(self, latents: Tensor) -> None:
        """Before a step at latents (B, 16, 9, h, w): the first of a stage is compared with none of the last one."""
        if latents.shape != self.stage_shape:
            self.stage_shape = latents.shape
            restart_step_cache(self.options)

    def predict_noise(
        self, x: Tensor, timestep: Tensor, model_options: dict[str, Any], seed: int | None = None
    ) -> Tensor:
        """The guided flow at x (B, 16, 9, h, w); called by the host, inside the MODEL's PREDICT_NOISE wrappers."""
        step: BoundStep = model_options[STEP_KEY]
        return step.predict(x, timestep, model_options, seed)
