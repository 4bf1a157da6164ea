"""Train Distilled of Helios-Tiny: two steps a stage, by regression on what Mid makes of each stage (reflow).

Mid runs its whole pyramid on real histories, and the start and the end of each of its stages are kept as a pair. On
the straight line between them the student learns the flow from start to end, at the very noise levels that Distilled
visits. Pairs made by one deterministic teacher cross little, so few steps along the lines are enough (Liu et al. 2022).
This is not the paper's distribution matching: that needs two more networks in training and far more compute.

`python training/distill.py [--pairs N] [--steps N] [--size 128] [--device cuda]`; a stopped run goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from helios import History, padding_bias, predict_flow, rotary_tables
from latents import Shelf
from parts import load_part, reader, weights_folder
from sample import Sampler, load_sampler, load_vae, make_predictor, make_scheduler, pyramid_stages, shift_of
from text import Phrasebook
from torch import Tensor
from train_transformer import Trained, draw
from trainer import CACHE, Average, Muon, Run, TrainStep, log, rngs, save_atomically, start_logging

BLOCK = 128  # pairs a file


@dataclass(frozen=True)
class Pairs:
    """What Mid did: `start0..2` and `end0..2` of its stages, the history's `long`, `mid` and `short`; captions."""

    tensors: dict[str, Tensor]  # (N, 16, T, h, w), float16
    captions: list[str]


@torch.no_grad()
def make_pairs(teacher: Sampler, shelf: Shelf, seed: int, number: int) -> Pairs:
    rng, noise = rngs(seed, number, teacher.device)
    example = draw(shelf, rng, noise, BLOCK)
    negative = teacher.embed([""] * BLOCK)
    with torch.autocast(teacher.device, torch.bfloat16):
        predict = make_predictor(teacher, teacher.embed(example.captions), negative, example.history)
        pure = torch.randn(example.target.shape, generator=noise, device=teacher.device)
        stages = list(pyramid_stages(teacher, predict, pure, torch.Generator().manual_seed(number)))
    tensors = {name: getattr(example.history, name).half() for name in ("long", "mid", "short")}
    for stage, (start, end) in enumerate(stages):
        tensors |= {f"start{stage}": start.half(), f"end{stage}": end.half()}
    return Pairs(tensors, example.captions)


def gather_pairs(teacher: Sampler, shelf: Shelf, seed: int, folder: Path, count: int) -> Pairs:
    """As many or a few more, on the teacher's device; those that the folder has are not made again."""
    blocks = []
    for number in range(math.ceil(count / BLOCK)):
        path = folder / f"{number:05d}.pt"
        if path.exists():
            blocks.append(Pairs(**torch.load(path, map_location=teacher.device, weights_only=True)))
        else:
            blocks.append(make_pairs(teacher, shelf, seed, number))
            save_atomically({"tensors": blocks[-1].tensors, "captions": blocks[-1].captions}, path)
            log.info("block %d of %d", number + 1, math.ceil(count / BLOCK))
    tensors = {name: torch.cat([block.tensors[name] for block in blocks]) for name in blocks[0].tensors}
    return Pairs(tensors, list(chain(*(block.captions for block in blocks))))


def digest(options: argparse.Namespace) -> str:
    """Of all that the pairs depend on: another teacher's are not to be taken for its."""
    seen = hashlib.sha256(f"{options.size} {options.teacher_steps} {options.seed}".encode())
    for file in sorted((weights_folder("mid") / "transformer").glob("*.safetensors")):
        seen.update(file.read_bytes())
    return seen.hexdigest()[:12]


def visited(size: int) -> list[list[tuple[float, float]]]:
    """For each stage the (sigma, timestep) at which Distilled asks the network: two steps most often, one, and the
    four of an amplified first chunk."""
    scheduler, levels = make_scheduler("distilled"), []
    for stage in range(3):
        side = size // 8 // 2 ** (2 - stage)
        mu = shift_of(torch.empty(1, 16, 9, side, side))
        places = []
        for count, weight in ((2, 3), (1, 1), (4, 1)):
            scheduler.set_timesteps(count, stage, mu=mu)
            grid = [(s.item(), float(t.long())) for s, t in zip(scheduler.sigmas, scheduler.timesteps, strict=False)]
            places += grid * (weight * 4 // count)
        levels.append(places)
    return levels


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=1536)
    parser.add_argument("--teacher-steps", type=int, default=8, help="of each stage")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--seconds", type=float, default=math.inf, help="end after so many, if steps are left")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--folder", type=Path, default=CACHE)
    options = parser.parse_args(arguments)
    start_logging()
    device = options.device
    teacher = load_sampler("mid", (options.teacher_steps,) * 3, None, device)
    shelf = Shelf(load_vae(device), options.folder, options.size)
    shelf.grow(100)  # more are there where Mid was trained
    pairs = gather_pairs(teacher, shelf, options.seed, options.folder / f"pairs-{digest(options)}", options.pairs)

    model = Trained(load_part("mid", "transformer"), load_part("mid", "text_encoder")).to(device)
    model.encoder.requires_grad_(False)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = Muon(trained, lr=options.lr)
    average = Average(trained, 0.998)
    run = Run("distilled", model, optimizer, average, options.folder, options.steps, options.seconds)
    known, bias, grid = Phrasebook(model.encoder, reader()), padding_bias(device), options.size // 16
    tables = {g: rotary_tables(model.transformer, g, grid).to(device) for g in (grid, grid // 2, grid // 4)}
    levels = [torch.tensor(places) for places in visited(options.size)]

    def loss_of(
        start: Tensor, end: Tensor, long: Tensor, mid: Tensor, short: Tensor, sigma: Tensor, time: Tensor, text: Tensor
    ) -> Tensor:
        line = end + sigma.view(-1, 1, 1, 1, 1) * (start - end)
        history = History(long, mid, short)
        with torch.autocast(device, torch.bfloat16):
            made = predict_flow(model.transformer, line, time, text, history, tables[line.shape[-1] // 2], bias)
        return (made - (start - end)).square().mean()

    train_steps = [TrainStep(loss_of, (p for _, p in trained), optimizer) for _ in range(3)]
    losses: list[Tensor] = []
    for step in run.steps(options.lr):
        rng, _ = rngs(options.seed + 1, step, device)
        stage = step % 3
        count = options.batch * (4, 2, 1)[stage]
        rows = rng.integers(len(pairs.captions), size=count)
        places = levels[stage][torch.from_numpy(rng.integers(len(levels[stage]), size=count))].float().to(device)
        where = torch.from_numpy(rows).to(device)
        names = (f"start{stage}", f"end{stage}", "long", "mid", "short")
        text = known([pairs.captions[row] for row in rows])
        batch = (*(pairs.tensors[name][where].float() for name in names), *places.unbind(1), text)
        losses.append(train_steps[stage](*batch))
        if (step + 1) % 60 == 0:
            run.write(loss=torch.stack(losses).mean().item())
            losses = []


if __name__ == "__main__":
    main()
