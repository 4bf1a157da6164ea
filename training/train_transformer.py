"""Train the transformer of Helios-Tiny: `base` from nothing together with the text encoder, `mid` from Base.

Flow matching with unified history injection: the clean latents of earlier chunks are tokens beside the noisy ones,
with relative positions, a timestep of 0, and damage of the kinds that a long video does to itself. Mid learns the
pyramid of three sizes (pyramidal flow matching): each stage goes from an enlarged noisy picture to a less noisy one.

`python training/train_transformer.py base [--steps N] [--size 128] [--device cuda]`; a stopped run goes on.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, HeliosScheduler, HeliosTransformer3DModel
from helios import NOISY, History, make_transformer, padding_bias, predict_flow, rotary_tables, split_history
from latents import CHUNKS, Shelf
from parts import load_part, reader, weights_folder
from sample import shift_of
from text import NEGATIVE, Phrasebook, embed, make_text_encoder
from torch import Tensor, nn
from trainer import CACHE, Average, Muon, Run, TrainStep, log, rngs, start_logging

PAST = 19  # latent frames of the history without the anchor
FIRST = 0.5  # share of first chunks: which way a thing goes, history tells all the others
VALIDATION_FIRST = 900_000_000


@dataclass(frozen=True)
class Example:
    target: Tensor  # (B, 16, 9, H, W)
    history: History
    captions: list[str]


def draw(shelf: Shelf, rng: np.random.Generator, noise: torch.Generator, count: int) -> Example:
    """Random chunks with what came before them, the history damaged, some captions withheld."""
    numbers = shelf.pool[rng.integers(len(shelf.pool), size=count)]
    chunks = np.where(rng.random(count) < FIRST, 0, rng.integers(1, CHUNKS, size=count))
    captions = [shelf.captions[number][chunk] for number, chunk in zip(numbers, chunks, strict=True)]
    for row in np.flatnonzero(rng.random(count) < 0.1):
        captions[row] = "" if rng.random() < 0.5 else NEGATIVE

    # The rows of `clip` are of clips, of `at` frames; what lies before the first frame is zero.
    clip, chunk, is_image = (
        torch.from_numpy(values).to(shelf.device)
        for values in (numbers, chunks, (chunks == 0) & (rng.random(count) < 0.2))
    )
    at = chunk[:, None] * NOISY + torch.arange(-PAST, NOISY, device=shelf.device)
    window = shelf.frames[clip[:, None], at.clamp_min(0)] * (at >= 0)[:, :, None, None, None]
    anchor = shelf.frames[clip, :1] * ((chunk > 0) | is_image)[:, None, None, None, None]
    window[:, PAST - 1] += shelf.stills[clip] * is_image[:, None, None, None]
    window, anchor = (part.transpose(1, 2).float() for part in (window, anchor))
    past, target = window[:, :, :PAST], window[:, :, PAST:]
    return Example(target, split_history(damage(past, noise), damage(anchor, noise)), captions)


def damage(past: Tensor, noise: torch.Generator) -> Tensor:
    """History corruption: noise on each frame, and now and then a wrong brightness or a blur. Zeros stay zero."""
    shape = (len(past), 1, past.shape[2], 1, 1)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=noise, device=past.device)

    is_there = (past != 0).any(1, keepdim=True)
    sigma = 0.2 * uniform(len(past), 1, 1, 1, 1) * uniform(*shape)
    blurred = F.interpolate(F.avg_pool3d(past, (1, 2, 2)), scale_factor=(1, 2, 2), mode="nearest")
    past = torch.where(uniform(len(past), 1, 1, 1, 1) < 0.05, 0.5 * (past + blurred), past)
    exposure = torch.randn((len(past), past.shape[1], 1, 1, 1), generator=noise, device=past.device)
    past = past + 0.1 * exposure * (uniform(len(past), 1, 1, 1, 1) < 0.2)
    past = (1 - sigma) * past + sigma * torch.randn(past.shape, generator=noise, device=past.device)
    return past * is_there


def spread(count: int, noise: torch.Generator, device: str) -> Tensor:
    """`count` numbers in 0..1, one in each of as many equal parts."""
    return (torch.arange(count, device=device) + torch.rand(count, generator=noise, device=device)) / count


def base_flow(target: Tensor, noise: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents, timesteps (B,), the flow to predict."""
    u = spread(len(target), noise, str(target.device))
    shift = math.exp(shift_of(target))  # of Base's schedule
    sigma = (shift * u / (1 + (shift - 1) * u)).view(-1, 1, 1, 1, 1)
    pure = torch.randn(target.shape, generator=noise, device=target.device)
    return (1 - sigma) * target + sigma * pure, 1000 * sigma.flatten(), pure - target


def pyramid_flow(
    target: Tensor, noise: torch.Generator, stage: int, scheduler: HeliosScheduler
) -> tuple[Tensor, Tensor, Tensor]:
    """As `base_flow`, in one stage of the pyramid (Jin et al. 2024), from the enlarged stage below to its own end."""
    clean = F.avg_pool3d(target, (1, 2 ** (2 - stage), 2 ** (2 - stage)))
    pure = torch.randn(clean.shape, generator=noise, device=target.device)
    start, end = scheduler.start_sigmas[stage], scheduler.end_sigmas[stage]
    coarse = clean
    if stage > 0:
        coarse = F.interpolate(F.avg_pool3d(clean, (1, 2, 2)), scale_factor=(1, 2, 2), mode="nearest")
    first, last = (1 - start) * coarse + start * pure, (1 - end) * clean + end * pure
    u = spread(len(target), noise, str(target.device))
    sigma = u.view(-1, 1, 1, 1, 1)
    times = scheduler.timesteps_per_stage[stage]
    timestep = times.min() + u * (times.max() - times.min())
    return sigma * first + (1 - sigma) * last, timestep.to(target.device), first - last


class Trained(nn.Module):
    """What a run trains, in one module for its checkpoint."""

    def __init__(self, transformer: HeliosTransformer3DModel, encoder: nn.Module) -> None:
        super().__init__()
        self.transformer, self.encoder = transformer, encoder


def load_average(variant: str, folder: Path, device: str) -> tuple[nn.Module, nn.Module]:
    """Transformer and text encoder of a run that may still be going on, with averaged weights."""
    state = torch.load(folder / f"{variant}.pt", map_location="cpu", weights_only=True)
    model = Trained(make_transformer(0), make_text_encoder(reader().size, 0))
    model.load_state_dict(state["model"] | state["average"])
    model = model.to(device).eval()
    return model.transformer, model.encoder


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variant", choices=("base", "mid"))
    parser.add_argument("--again", action="store_true", help="begin with the finished weights of the variant itself")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--seconds", type=float, default=math.inf, help="end after so many, if steps are left")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--clips", type=int, default=100, help="encoded before the first step")
    parser.add_argument("--more", type=int, default=100, help="another block of clips every so many steps")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--folder", type=Path, default=CACHE)
    options = parser.parse_args(arguments)
    start_logging()
    device = options.device
    vae = AutoencoderKLWan.from_pretrained(weights_folder() / "vae").float().to(device).requires_grad_(False)
    shelf = Shelf(vae, options.folder, options.size)
    shelf.grow(options.clips)
    log.info("%d clips", len(shelf.frames))
    held = Shelf(vae, options.folder / "validation", options.size, VALIDATION_FIRST)
    held.grow(25)

    read = reader()
    if options.again or options.variant == "mid":
        start = options.variant if options.again else "base"
        model = Trained(load_part(start, "transformer"), load_part(start, "text_encoder")).to(device)
        model.encoder.requires_grad_(False)
    else:
        model = Trained(make_transformer(options.seed), make_text_encoder(read.size, options.seed)).to(device)
    known = Phrasebook(model.encoder, read)
    trains_text = options.variant == "base" and not options.again
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = Muon(trained, lr=options.lr)
    average = Average(trained, 0.999)
    run = Run(options.variant, model, optimizer, average, options.folder, options.steps, options.seconds)
    scheduler = HeliosScheduler(stages=3, stage_range=[0, 1 / 3, 2 / 3, 1])
    grid = options.size // 16
    bias = padding_bias(device)
    tables = {g: rotary_tables(model.transformer, g, grid).to(device) for g in (grid, grid // 2, grid // 4)}

    def prepare(example: Example, noise: torch.Generator, stage: int) -> tuple[Tensor, ...]:
        if options.variant == "base":
            noisy, timestep, flow = base_flow(example.target, noise)
        else:
            noisy, timestep, flow = pyramid_flow(example.target, noise, stage, scheduler)
        words = [part.to(device) for part in read(example.captions)] if trains_text else [known(example.captions)]
        history = example.history
        return noisy, timestep, flow, history.long, history.mid, history.short, *words

    def loss_of(noisy: Tensor, timestep: Tensor, flow: Tensor, *rest: Tensor) -> Tensor:
        long, mid, short, *words = rest
        with torch.autocast(device, torch.bfloat16):
            text = embed(model.encoder, *words) if trains_text else words[0]
            table = tables[noisy.shape[-1] // 2]
            made = predict_flow(model.transformer, noisy, timestep, text, History(long, mid, short), table, bias)
        return (made - flow).square().mean()

    @torch.no_grad()
    def validate() -> float:
        losses = []
        for number in range(6):
            rng, noise = rngs(options.seed + 1000, number, device)
            losses.append(loss_of(*prepare(draw(held, rng, noise, 16), noise, number % 3)).item())
        return float(np.mean(losses))

    train_steps = [TrainStep(loss_of, (p for _, p in trained), optimizer) for _ in range(3)]
    losses: list[Tensor] = []
    for step in run.steps(options.lr):
        rng, noise = rngs(options.seed, step, device)
        stage = 0 if options.variant == "base" else step % 3
        count = options.batch if options.variant == "base" else options.batch * (4, 2, 1)[stage]
        losses.append(train_steps[stage](*prepare(draw(shelf, rng, noise, count), noise, stage)))
        if (step + 1) % 100 == 0:
            values = {}
            if (step + 1) % 500 == 0:
                with run.averaged():
                    values = {"held": validate()}
            run.write(loss=torch.stack(losses).mean().item(), **{"held": float("nan")} | values)
            losses = []
        if (step + 1) % options.more == 0:
            shelf.grow(len(shelf.frames) + 1)


if __name__ == "__main__":
    main()
