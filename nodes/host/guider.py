"""Sampling inside the host: its guider loads models, hooks and wrappers once, the core's loop does the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import comfy.conds
import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor

from ...helios_core.config import CHUNK_LATENTS, LATENT_CHANNELS
from ...helios_core.generate import Chunk, PredictFlow, Step, generate
from ...helios_core.guidance import cfg, cfg_zero_star, projection
from ...helios_core.history import History, Memory
from ...helios_core.regular_file import check_unchanged
from ...helios_core.schedule import TRAIN_STEPS, Schedule, stages
from .cache import CACHE_KEY, RunCache, can_cache, text_bytes_per_token
from .memory import release
from .model import MEMORY_KEY, TEXT_CACHED_KEY, FlowSampling, history_conds
from .progress import SamplingProgress
from .prompts import TRACK_KEY

GUIDANCE_HOOKS = (
    "sampler_calc_cond_batch_function",
    "sampler_pre_cfg_function",
    "sampler_cfg_function",
    "sampler_post_cfg_function",
    "disable_cfg1_optimization",
)


class HeliosGuider(comfy.samplers.CFGGuider):
    """Denoises `chunks` chunks that follow on `memory`, in one run of the host's sampling machinery.

    Each finished chunk goes to a consumer, and nothing else of it is kept. Afterwards `memory` (on the CPU) is what a
    next chunk would follow on.
    """

    original_conds: dict[str, list[dict[str, Any]]]  # by the host: as they were set, per prompt
    conds: dict[str, list[dict[str, Any]]]  # by the host: processed
    loaded_models: list[Any]  # by the host: what it has loaded beside the model
    on_chunk: Callable[[Chunk], None]
    on_step: Callable[[], None]
    cache: RunCache | None = None  # while it runs

    def __init__(
        self,
        model_patcher: Any,
        schedule: Schedule,
        memory: Memory,
        chunks: int,
        rng: torch.Generator,
        *,
        first_index: int = 0,
        skip_first_chunk: bool = False,
    ):
        super().__init__(model_patcher)
        self.set_cfg(schedule.guidance_scale)
        self.schedule, self.memory, self.chunks, self.rng = schedule, memory, chunks, rng
        self.first_index, self.skip_first_chunk = first_index, skip_first_chunk
        self.done = 0  # chunks that an earlier run has made

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        """Of one chunk: (B, 16, 9, H, W)."""
        b, _, _, height, width = self.memory.latents.shape
        return (b, LATENT_CHANNELS, CHUNK_LATENTS, height, width)

    def steps(self, chunks: int) -> int:
        """How many steps the first `chunks` chunks of this run have."""
        return sum(self.schedule.steps_in_chunk(self.first_index + i) for i in range(chunks))

    def resume(self, done: int, memory: Memory, rng_state: Tensor) -> None:
        """Take the first `done` chunks for made; memory and rng_state are as they were after the last of them."""
        self.done, self.memory = done, memory
        self.rng.set_state(rng_state)

    def run(
        self,
        on_chunk: Callable[[Chunk], None],
        beside: Sequence[Any] = (),
        on_step: Callable[[], None] = lambda: None,
    ) -> None:
        """Denoise all chunks that are not done; on_chunk is called with each, normalised, on the model's device.

        The patchers `beside` are loaded together with the model. on_step is called after each step.
        """
        self.on_chunk, self.on_step = on_chunk, on_step
        check_unchanged(self.model_patcher.model.files)
        # The host sizes memory by the noise it is given: one chunk, however long the video. Noise is drawn in the loop.
        noise = torch.zeros(self.chunk_shape)
        plan = stages(self.schedule, noise.shape[-2], noise.shape[-1], first_chunk=False)
        sigmas = torch.cat([*(stage.timesteps / TRAIN_STEPS for stage in plan), torch.zeros(1)]).float()
        given = self.original_conds
        self.original_conds = self.sized_conds(beside)
        try:
            self.sample(noise, torch.zeros_like(noise), None, sigmas, seed=self.rng.initial_seed())
        finally:
            self.original_conds = given
            release(self.model_patcher)
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

        progress = SamplingProgress(self.model_patcher, self.steps(self.chunks), done=self.steps(self.done))

        def on_step(step: Step) -> None:
            progress(step)
            self.on_step()

        loop = generate(
            self.bind_chunk,
            self.schedule,
            self.memory.to(device),
            self.chunks - self.done,
            self.rng,
            first_index=self.first_index + self.done,
            skip_first_chunk=self.skip_first_chunk,
            on_step=on_step,
        )
        with self.caching(device):
            for chunk in loop:
                self.memory = chunk.memory
                self.on_chunk(chunk)
        return latent_image  # the host wants one back; the chunks are with their consumer

    def sizes(self, name: str) -> dict[str, Any]:
        """What the host is to count for the conds of this name, "positive" or "negative", when it sizes memory."""
        used = name == "positive" or self.schedule.guided
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
        fits = self.sampling_memory()[0] <= comfy.model_management.get_free_memory(device)
        prompts = sum(cond["cross_attn"].shape[1] for conds in self.conds.values() for cond in conds)
        model = self.inner_model
        dtype = model.manual_cast_dtype or model.get_dtype()
        limit = prompts * self.chunk_shape[0] * text_bytes_per_token(model.diffusion_model, dtype) if fits else 0
        self.cache = RunCache(limit)
        self.options["transformer_options"][CACHE_KEY] = self.cache
        try:
            yield
        finally:
            self.cache = None
            del self.options["transformer_options"][CACHE_KEY]

    def sampling_memory(self) -> tuple[float, float]:
        """Bytes that predictions of a chunk need, and the least they get by with, by the host's way of estimating."""
        return comfy.sampler_helpers.estimate_memory(self.model_patcher, self.chunk_shape, self.sized_conds())

    def load_again(self) -> None:
        """Load the model once more, between two chunks, where something else may have taken its place."""
        required, minimum = self.sampling_memory()
        comfy.model_management.load_models_gpu(
            [self.model_patcher, *self.loaded_models], memory_required=required, minimum_memory_required=minimum
        )

    def bind_chunk(self, index: int, history: History) -> PredictFlow:
        """Predict with this history and the chunk's prompt: the host's conds, with these in their model_conds."""
        check_unchanged(self.model_patcher.model.files)
        extra = history_conds(history, self.memory.layout)
        prompts = {}  # where they lie in memory: comparing them on the device would wait for it

        def with_chunk(cond: dict[str, Any]) -> dict[str, Any]:
            model_conds = {**cond["model_conds"], **extra}
            prompts[cond["uuid"]] = cond["cross_attn"]
            if TRACK_KEY in cond:
                prompts[cond["uuid"]] = prompt = cond[TRACK_KEY].at(index - self.first_index)
                model_conds["c_crossattn"] = comfy.conds.CONDCrossAttn(prompt.to(history.short.device))
            return {**cond, "model_conds": model_conds}

        self.chunk_conds = {name: [with_chunk(cond) for cond in conds] for name, conds in self.conds.items()}

        if self.cache is not None:
            self.cache.start_chunk(prompts)
        self.restart_trajectory()
        sampling: FlowSampling = self.inner_model.model_sampling

        def predict(latents: Tensor, timestep: float, sigma: float) -> Tensor:
            self.sigma = sigma
            host_sigma = torch.full((latents.shape[0],), timestep / TRAIN_STEPS, device=latents.device)
            sampling.exact_timestep = timestep
            try:
                return self(latents, host_sigma, self.options, self.rng.initial_seed())
            finally:
                sampling.exact_timestep = None

        return predict

    def restart_trajectory(self) -> None:
        """Every chunk is denoised from noise again: what the host keeps along the way starts over."""
        for conds in self.conds.values():
            for cond in conds:
                if cond.get("hooks"):
                    cond["hooks"].reset()
        self.inner_model.current_patcher.clear_cached_hook_weights()
        if cache := self.options["transformer_options"].get("easycache"):  # EasyCache and LazyCache
            cache.reset()

    def predict_noise(
        self, x: Tensor, timestep: Tensor, model_options: dict[str, Any] | None = None, seed: int | None = None
    ) -> Tensor:
        """The guided flow at x (B, 16, 9, h, w); called through the MODEL's PREDICT_NOISE wrappers."""
        options = model_options or {}
        positive, negative = self.chunk_conds["positive"], self.chunk_conds.get("negative")
        if any(options.get(hook) for hook in GUIDANCE_HOOKS):
            return self._hooked_guidance(x, timestep, positive, negative, options, seed)
        if not self.schedule.guided:
            negative = None
        cond, uncond = comfy.samplers.calc_cond_batch(self.inner_model, [positive, negative], x, timestep, options)
        if negative is None:
            return cond
        guide = cfg_zero_star if self.schedule.guidance == "cfg_zero_star" else cfg
        return guide(cond, uncond, self.cfg)

    def _hooked_guidance(self, x, timestep, positive, negative, options, seed) -> Tensor:
        """Guidance by the host, with the MODEL's own functions, which think in denoised latents: there and back."""
        if self.schedule.guided and self.schedule.guidance == "cfg_zero_star":

            def scale_uncond(args: dict[str, Any]) -> list[Tensor]:
                cond, uncond, *rest = args["conds_out"]
                flow, negative_flow = (x - cond) / self.sigma, (x - uncond) / self.sigma
                return [cond, x - self.sigma * projection(flow, negative_flow) * negative_flow, *rest]

            options = {
                **options,
                "sampler_pre_cfg_function": [scale_uncond, *options.get("sampler_pre_cfg_function", [])],
            }
        sampling: FlowSampling = self.inner_model.model_sampling
        sampling.denoise_sigma = self.sigma
        try:
            denoised = comfy.samplers.sampling_function(
                self.inner_model, x, timestep, negative, positive, self.cfg, model_options=options, seed=seed
            )
        finally:
            sampling.denoise_sigma = None
        return (x - denoised) / self.sigma
