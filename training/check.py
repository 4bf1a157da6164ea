"""Check that the fast forms used in training are the functions that diffusers defines, to rounding.

`python training/check.py` takes a minute and prints the largest differences.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, HeliosPipeline, HeliosPyramidPipeline, HeliosTransformer3DModel
from helios import CONFIG, TEXT_DIM, make_transformer, padding_bias, predict_flow, rotary_tables, split_history
from original_vae import original_tensors
from sample import Sampler, generate, make_scheduler
from torch import Tensor, nn
from train_vae import make_vae
from trainer import log, start_logging
from wan import decode, encode

TOLD = 20


def vae_difference() -> float:
    """Clips of 9 frames and single images, there and back."""
    vae, worst = make_vae().eval(), 0.0
    for frames in (1, 9):
        video = torch.rand(2, frames, 3, 64, 64) * 2 - 1
        mean, _ = encode(vae, video)
        latents = torch.randn_like(mean)
        reference = vae.encode(video.transpose(1, 2)).latent_dist.mean.transpose(1, 2)
        decoded = vae.decode(latents.transpose(1, 2)).sample.transpose(1, 2)
        worst = max(worst, (mean - reference).abs().max().item())
        worst = max(worst, (decode(vae, latents).clamp(-1, 1) - decoded).abs().max().item())
    return worst


def loud_transformer() -> HeliosTransformer3DModel:
    model = make_transformer(0).eval()
    rng = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=rng))
    return model


def padded(text: Tensor) -> Tensor:
    return F.pad(text, (0, 0, 0, 512 - text.shape[1]))


def transformer_difference(model: HeliosTransformer3DModel) -> float:
    """All three sizes of a pyramid, with texts of 512 zero-padded tokens in the reference."""
    worst, index = 0.0, torch.arange(29)[None].expand(2, -1)
    history = split_history(torch.randn(2, 16, 19, 8, 8), torch.randn(2, 16, 1, 8, 8))
    text = F.pad(torch.randn(2, TOLD, TEXT_DIM), (0, 0, 0, 32 - TOLD))
    for side in (8, 4, 2):
        noisy, timestep = torch.randn(2, 16, 9, side, side), torch.tensor([300.0, 700.0])
        places = (index[:, 20:], index[:, [0, 19]], index[:, 17:19], index[:, 1:17])
        parts = (history.short, history.mid, history.long)
        reference = model(noisy, timestep, padded(text), *places, *parts, return_dict=False)[0]
        table = rotary_tables(model, side // 2, 4)
        made = predict_flow(model, noisy, timestep, text, history, table, padding_bias())
        worst = max(worst, (made - reference).abs().max().item())
    return worst


class Fixed(nn.Module):
    """A stand-in for the text encoder: rows of a table by the caption."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = {name: torch.randn(1, TOLD, TEXT_DIM) for name in ("wanted", "")}


class FixedSampler(Sampler):
    def embed(self, captions) -> Tensor:
        return F.pad(torch.cat([self.encoder.rows[name] for name in captions]), (0, 0, 0, 32 - TOLD))


def sampling_difference(model: HeliosTransformer3DModel, variant: str, steps: tuple[int, ...]) -> float:
    """Two chunks by our loop and by the pipeline, from the same noise. Of a pyramid only where no block noise is
    drawn, the orders of whose numbers differ: the difference is that of the distributions, see `block_noise_error`."""
    encoder = Fixed()
    guidance = 1.0 if variant == "distilled" else 5.0
    made = generate(FixedSampler(variant, model, encoder, steps, guidance), [["wanted"]] * 2, 64, seed=3)
    vae = AutoencoderKLWan(base_dim=2, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    parts = {
        "tokenizer": None,
        "text_encoder": None,
        "vae": vae,
        "transformer": model,
        "scheduler": make_scheduler(variant),
    }
    extra = {} if variant == "base" else {"is_cfg_zero_star": variant == "mid", "is_distilled": variant == "distilled"}
    pipeline = (HeliosPipeline if variant == "base" else HeliosPyramidPipeline)(**parts, **extra)
    pipeline.set_progress_bar_config(disable=True)
    count = (
        {"num_inference_steps": steps[0]} if variant == "base" else {"pyramid_num_inference_steps_list": list(steps)}
    )
    reference = pipeline(
        prompt_embeds=padded(encoder.rows["wanted"]),
        negative_prompt_embeds=padded(encoder.rows[""]),
        height=64,
        width=64,
        num_frames=66,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
        **count,
    ).frames
    return (made - reference).abs().max().item()


def silence_block_noise() -> None:
    """No block noise, in both loops: they draw it in another order, and AMD's LAPACK finds no factor in float32."""
    import sample

    def enter_stage(latents, scheduler, stage, rng):
        alpha = 1 / (2 * scheduler.ori_start_sigmas[stage] + 1 - scheduler.ori_start_sigmas[stage])
        return alpha * F.interpolate(latents, scale_factor=(1, 2, 2), mode="nearest")

    sample.enter_stage = enter_stage
    HeliosPyramidPipeline.sample_block_noise = lambda self, b, c, t, h, w, *_: torch.zeros(b, c, t, h, w)


def layout_is_known() -> bool:
    """Whether diffusers reads our file in the original layout back as the same VAE."""
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    vae = make_vae()
    back, own = convert_wan_vae_to_diffusers(dict(original_tensors(vae))), vae.state_dict()
    return back.keys() == own.keys() and all(torch.equal(back[name], own[name]) for name in own)


@torch.no_grad()
def main() -> int:
    start_logging()
    torch.manual_seed(0)
    model = loud_transformer()
    model.register_forward_hook(lambda module, args, output: tuple(x.contiguous() for x in output))
    silence_block_noise()
    values = {
        "vae": vae_difference(),
        "transformer": transformer_difference(model),
        "base": sampling_difference(model, "base", (3,)),
        "mid": sampling_difference(model, "mid", (3, 2, 2)),
        "distilled": sampling_difference(model, "distilled", (2, 2, 2)),
    }
    log.info("%d layers of %d; differences: %s", CONFIG["num_layers"], CONFIG["num_attention_heads"], values)
    log.info("original VAE layout: %s", layout_is_known())
    return 0 if max(values.values()) < 1e-3 and layout_is_known() else 1


if __name__ == "__main__":
    sys.exit(main())
