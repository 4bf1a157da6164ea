"""Sampling inside the host: its guider loads models, hooks and wrappers once, the core's loop does the rest."""

from __future__ import annotations

from typing import Any

import comfy.conds
import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.samplers
import torch
from torch import Tensor

from ...helios_core.config import CHUNK_FRAMES, CHUNK_LATENTS, LATENT_CHANNELS, SPATIAL_SCALE
from ...helios_core.generate import PredictFlow, generate
from ...helios_core.guidance import cfg, cfg_zero_star, projection
from ...helios_core.history import History, Memory
from ...helios_core.schedule import TRAIN_STEPS, Schedule, stages
from .model import MEMORY_KEY, FlowSampling, HeliosModel, history_conds
from .progress import SamplingProgress
from .prompts import TRACK_KEY, find_track

GUIDANCE_HOOKS = (
    "sampler_calc_cond_batch_function",
    "sampler_pre_cfg_function",
    "sampler_cfg_function",
    "sampler_post_cfg_function",
    "disable_cfg1_optimization",
)
UNSUPPORTED = {
    "area": "area conditioning",
    "mask": "masked conditioning",
    "control": "ControlNet",
    "gligen": "GLIGEN",
}


class HeliosGuider(comfy.samplers.CFGGuider):
    """Denoises `chunks` chunks that follow on `memory`, in one run of the host's sampling machinery.

    Afterwards `memory` (on the CPU) is what a next chunk would follow on.
    """

    conds: dict[str, list[dict[str, Any]]]  # by the host: processed, per prompt

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

    def generate(self) -> Tensor:
        """Latents (B, 16, 9 * chunks, H, W) in VAE space, float32, on the host's intermediate device."""
        b, _, _, height, width = self.memory.latents.shape
        # The host sizes memory by the noise it is given: one chunk, however long the video. Noise is drawn in the loop.
        noise = torch.zeros((b, LATENT_CHANNELS, CHUNK_LATENTS, height, width))
        plan = stages(self.schedule, height, width, first_chunk=False)
        sigmas = torch.cat([*(stage.timesteps / TRAIN_STEPS for stage in plan), torch.zeros(1)]).float()
        for conds in self.original_conds.values():
            for cond in conds:
                cond[MEMORY_KEY] = self.memory
        return self.sample(noise, torch.zeros_like(noise), None, sigmas, seed=self.rng.initial_seed())

    def inner_sample(
        self, noise, latent_image, device, sampler, sigmas, denoise_mask, callback, disable_pbar, seed, **newer
    ) -> Tensor:
        """Where the host would run a sampler on the loaded model; called by `CFGGuider.sample`."""
        self.conds = comfy.samplers.process_conds(
            self.inner_model, noise, self.conds, device, latent_image, denoise_mask, seed, **newer
        )
        self.options = comfy.model_patcher.create_model_options_clone(self.model_options)
        self.options.setdefault("transformer_options", {})["sample_sigmas"] = sigmas

        b, channels, frames, height, width = noise.shape
        intermediate = comfy.model_management.intermediate_device()
        video = torch.empty((b, channels, frames * self.chunks, height, width), device=intermediate)
        steps = sum(self.schedule.steps_in_chunk(self.first_index + i) for i in range(self.chunks))
        loop = generate(
            self.bind_chunk,
            self.schedule,
            self.memory.to(device),
            self.chunks,
            self.rng,
            first_index=self.first_index,
            skip_first_chunk=self.skip_first_chunk,
            on_step=SamplingProgress(self.model_patcher, steps),
        )
        for i, chunk in enumerate(loop):
            video[:, :, i * frames : (i + 1) * frames] = self.inner_model.process_latent_out(chunk.latents.float())
            self.memory = chunk.memory
        self.memory = self.memory.to("cpu")
        return video

    def bind_chunk(self, index: int, history: History) -> PredictFlow:
        """Predict with this history and the chunk's prompt: the host's conds, with these in their model_conds."""
        extra = history_conds(history, self.memory.layout)

        def with_chunk(cond: dict[str, Any]) -> dict[str, Any]:
            model_conds = {**cond["model_conds"], **extra}
            if TRACK_KEY in cond:
                prompt = cond[TRACK_KEY].at(index - self.first_index)
                model_conds["c_crossattn"] = comfy.conds.CONDCrossAttn(prompt)
            return {**cond, "model_conds": model_conds}

        self.chunk_conds = {name: [with_chunk(cond) for cond in conds] for name, conds in self.conds.items()}

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


def check_sampling(model_patcher: Any, positive: list, negative: list, latents: Tensor, schedule: Schedule) -> int:
    """The number of chunks to sample. Raises ValueError, before anything is loaded, for what cannot be sampled."""
    if not isinstance(model_patcher.model, HeliosModel):
        raise ValueError(
            f"Helios Chunked Sampler needs a Helios model, got {type(model_patcher.model).__name__}. "
            "Load one with Helios Model Loader or Helios Diffusers Loader."
        )
    if not isinstance(model_patcher.get_model_object("model_sampling"), FlowSampling):
        raise ValueError(
            "The MODEL went through a node that replaces its sampling (such as ModelSamplingSD3). "
            "Take that node out: the shift of Helios is part of its schedule."
        )
    if not positive:
        raise ValueError("The positive conditioning is empty. Connect a prompt through Helios History Injection.")
    for name, conditioning in (("positive", positive), ("negative", negative)):
        found = next((UNSUPPORTED[key] for _, values in conditioning for key in UNSUPPORTED if key in values), None)
        if found:
            raise ValueError(f"Helios Chunked Sampler does not support {found} ({name}). Take it out of the graph.")
        width = model_patcher.model.diffusion_model.config.text_dim
        wrong = next((tuple(embedding.shape) for embedding, _ in conditioning if embedding.shape[-1] != width), None)
        if wrong:
            raise ValueError(
                f"The {name} conditioning is {wrong[-1]} wide, the model expects {width}. Encode the prompt with the "
                "UMT5-XXL text encoder (CLIPLoader of type wan, or Helios Diffusers Loader)."
            )
    if (
        latents.ndim != 5
        or latents.shape[1] != LATENT_CHANNELS
        or latents.shape[2] % CHUNK_LATENTS
        or not latents.numel()
    ):
        raise ValueError(
            f"The LATENT has the shape {tuple(latents.shape)}; expected (batch, {LATENT_CHANNELS}, a multiple of "
            f"{CHUNK_LATENTS}, height / 8, width / 8). Make it with Helios History Injection."
        )
    schedule.check_size(latents.shape[-2] * SPATIAL_SCALE, latents.shape[-1] * SPATIAL_SCALE)
    chunks = latents.shape[2] // CHUNK_LATENTS
    track = find_track(positive)
    if track and sum(track.chunks) > chunks:
        raise ValueError(
            f"The prompts last {sum(track.chunks)} chunks, but the video has {chunks} ({chunks * CHUNK_FRAMES} frames)."
            " Connect the prompt schedule's frames to Helios History Injection, or shorten the prompts."
        )
    return chunks
