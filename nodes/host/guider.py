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
from ...helios_core.guidance import cfg, projection
from ...helios_core.history import History, Memory
from ...helios_core.schedule import Schedule, stages
from .model import MEMORY_KEY, FlowSampling, HeliosModel, history_conds
from .progress import SamplingProgress
from .prompts import TRACK_KEY, find_track

CFG_HOOKS = ("sampler_cfg_function", "sampler_pre_cfg_function", "sampler_post_cfg_function")
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
        timesteps = torch.cat([*(stage.timesteps for stage in plan), torch.zeros(1)]).float()
        for conds in self.original_conds.values():
            for cond in conds:
                cond[MEMORY_KEY] = self.memory
        return self.sample(noise, torch.zeros_like(noise), None, timesteps, seed=self.rng.initial_seed())

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

        def predict(latents: Tensor, timestep: float, sigma: float) -> Tensor:
            self.sigma = sigma
            batch = torch.full((latents.shape[0],), timestep, device=latents.device)
            return self(latents, batch, self.options, self.rng.initial_seed())

        return predict

    def predict_noise(
        self, x: Tensor, timestep: Tensor, model_options: dict[str, Any] | None = None, seed=None
    ) -> Tensor:
        """The guided flow at x (B, 16, 9, h, w); called through the MODEL's PREDICT_NOISE wrappers."""
        options = model_options or {}
        positive, negative = self.chunk_conds["positive"], self.chunk_conds.get("negative")
        if not self.schedule.guided and not options.get("disable_cfg1_optimization", False):
            negative = None
        cond, uncond = comfy.samplers.calc_cond_batch(self.inner_model, [positive, negative], x, timestep, options)
        if negative is not None and self.schedule.guidance == "cfg_zero_star":
            uncond = uncond * projection(cond, uncond)
        if any(options.get(hook) for hook in CFG_HOOKS):
            return self._hooked_guidance(x, timestep, cond, uncond, positive, negative, options)
        return cond if negative is None else cfg(cond, uncond, self.cfg)

    def _hooked_guidance(self, x, timestep, cond, uncond, positive, negative, options) -> Tensor:
        """Guidance by the MODEL's own functions, which think in denoised latents: x - sigma * flow, there and back."""
        sigma = torch.full_like(timestep, self.sigma)
        denoised = [x - self.sigma * flow for flow in (cond, uncond)]
        for hook in options.get("sampler_pre_cfg_function", []):
            denoised = hook(
                {
                    "conds": [positive, negative],
                    "conds_out": denoised,
                    "cond_scale": self.cfg,
                    "timestep": sigma,
                    "input": x,
                    "sigma": sigma,
                    "model": self.inner_model,
                    "model_options": options,
                }
            )
        if negative is None:
            denoised[1] = denoised[0]
        result = comfy.samplers.cfg_function(
            self.inner_model, *denoised, self.cfg, x, sigma, model_options=options, cond=positive, uncond=negative
        )
        return (x - result) / self.sigma


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
