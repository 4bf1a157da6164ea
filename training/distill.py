"""Train Distilled of Helios-Tiny: two steps a stage, by regression on what Mid makes of each stage (reflow).

Mid runs its whole pyramid on real histories, and the start and the end of each of its stages are kept as a pair. On
the straight line between them the student learns the flow from start to end, at the very noise levels that Distilled
visits. Pairs made by one deterministic teacher cross little, so few steps along the lines are enough (Liu et al. 2022).
This is not the paper's distribution matching: that needs two more networks in training and far more compute.

`python training/distill.py [--pairs N] [--steps N] [--size 128] [--device cuda]`; a stopped run goes on.
"""

from __future__ import annotations

import argparse
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from helios import History, padding_bias, predict_flow, rotary_tables
from latents import Shelf
from parts import load_part, reader
from sample import Sampler, load_sampler, load_vae, make_predictor, make_scheduler, pyramid_stages, shift_of
from text import embed
from torch import Tensor
from train_transformer import Trained, draw
from trainer import CACHE, Average, Muon, Run, log, rngs, save_atomically, start_logging, warm_cosine

BLOCK = 32  # pairs a file
Pairs = dict[str, Tensor | list[str]]


@torch.no_grad()
def make_pairs(teacher: Sampler, shelf: Shelf, seed: int, number: int) -> Pairs:
    """One block of what Mid does: start0..2 and end0..2 of its stages, histories and captions."""
    rng, noise = rngs(seed, number, teacher.device)
    example = draw(shelf, rng, noise, BLOCK, teacher.device)
    negative = teacher.embed([""] * BLOCK)
    with torch.autocast(teacher.device, torch.bfloat16):
        predict = make_predictor(teacher, teacher.embed(example.captions), negative, example.history)
        pure = torch.randn(example.target.shape, generator=noise, device=teacher.device)
        stages = list(pyramid_stages(teacher, predict, pure, torch.Generator().manual_seed(number)))
    pairs: Pairs = {"captions": example.captions}
    for stage, (start, end) in enumerate(stages):
        pairs[f"start{stage}"], pairs[f"end{stage}"] = start.half().cpu(), end.half().cpu()
    for name in ("long", "mid", "short"):
        pairs[name] = getattr(example.history, name).half().cpu()
    return pairs


def load_pairs(folder: Path) -> Pairs:
    blocks = [torch.load(path, weights_only=True) for path in sorted(folder.glob("*.pt"))]
    return {
        key: list(chain(*(b[key] for b in blocks))) if key == "captions" else torch.cat([b[key] for b in blocks])
        for key in blocks[0]
    }


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=1536)
    parser.add_argument("--teacher-steps", type=int, default=8, help="of each stage")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--folder", type=Path, default=CACHE)
    options = parser.parse_args()
    start_logging()
    device = options.device
    folder = options.folder / f"pairs-{options.size}"
    teacher = load_sampler("mid", (options.teacher_steps,) * 3, None, device)
    shelf = Shelf(load_vae(device), options.folder, options.size)
    for number in range(options.pairs // BLOCK):
        path = folder / f"{number:05d}.pt"
        if not path.exists():
            save_atomically(make_pairs(teacher, shelf, options.seed, number), path)
            log.info("block %d of %d", number + 1, options.pairs // BLOCK)
    pairs = load_pairs(folder)

    model = Trained(load_part("mid", "transformer"), load_part("mid", "text_encoder")).to(device)
    model.encoder.requires_grad_(False)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = Muon(trained, lr=options.lr)
    run = Run("distilled", model, optimizer, Average((p for _, p in trained), 0.998), options.folder)
    read, bias, grid = reader(), padding_bias(device), options.size // 16
    tables = {g: rotary_tables(model.transformer, g, grid).to(device) for g in (grid, grid // 2, grid // 4)}
    levels, losses = visited(options.size), []
    for step in run.steps(options.steps):
        rng, _ = rngs(options.seed + 1, step, device)
        stage = step % 3
        count = options.batch * (4, 2, 1)[stage]
        rows = rng.integers(len(pairs["captions"]), size=count)
        start, end, long, mid, short = (
            pairs[key][rows].float().to(device) for key in (f"start{stage}", f"end{stage}", "long", "mid", "short")
        )
        places = torch.tensor(levels[stage])[torch.from_numpy(rng.integers(len(levels[stage]), size=count))].to(device)
        sigma = places[:, 0].view(-1, 1, 1, 1, 1).float()
        ids, mask = read([pairs["captions"][row] for row in rows])
        with torch.autocast(device, torch.bfloat16):
            text = embed(model.encoder, ids.to(device), mask.to(device))
            line = (1 - sigma) * end + sigma * start
            table = tables[line.shape[-1] // 2]
            made = predict_flow(model.transformer, line, places[:, 1], text, History(long, mid, short), table, bias)
        loss = (made - (start - end)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in trained], 1.0)
        for group in optimizer.param_groups:
            group["lr"] = options.lr * warm_cosine(step, options.steps, 100)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 60 == 0:
            run.write(loss=float(np.mean(losses)))
            losses = []
    log.info("stopped at step %d of %d", run.step, options.steps)


if __name__ == "__main__":
    main()
