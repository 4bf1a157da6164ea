"""What every training run shares: checkpoints that survive a kill, clean ends, learning rates, a log, the optimizer.

A step's random numbers are a function of the seed and the step alone, so a run that is resumed is the run that was not
interrupted.
"""

from __future__ import annotations

import csv
import logging
import math
import os
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

CACHE = Path.home() / ".cache" / "helios-tiny"
log = logging.getLogger("training")


def start_logging() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for name in ("httpx", "diffusers"):
        logging.getLogger(name).setLevel(logging.WARNING)


def save_atomically(state: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    with draft.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def rngs(seed: int, step: int, device: str) -> tuple[np.random.Generator, torch.Generator]:
    """The random numbers of one step, for the world and for the noise."""
    return np.random.default_rng((seed, step)), torch.Generator(device).manual_seed(seed * 1_000_003 + step)


def warm_cosine(step: int, total: int, warm_up: int, last: float = 0.02) -> float:
    """Factor of the learning rate: up over `warm_up` steps, then down along a cosine to `last`."""
    if step < warm_up:
        return (step + 1) / warm_up
    progress = min(1.0, (step - warm_up) / max(1, total - warm_up))
    return last + (1 - last) * 0.5 * (1 + math.cos(math.pi * progress))


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal for matrices and kernels (Jordan et al. 2024), AdamW for the rest, one learning rate.

    A kernel counts as a matrix of its outputs. Steps are scaled to the size that AdamW's would have.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], lr: float, weight_decay: float = 0.01) -> None:
        matrices, others = [], []
        for name, parameter in named:
            is_table = parameter.dim() < 2 or any(
                word in name for word in ("table", "shared", "relative", "gamma", "proj_out", "conv_out", "patch_")
            )
            (others if is_table else matrices).append(parameter)
        groups = [{"params": matrices, "orthogonal": True}, {"params": others, "orthogonal": False}]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                    if not group["orthogonal"]:
                        state["square"], state["count"] = torch.zeros_like(parameter), 0
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                if group["orthogonal"]:
                    state["momentum"].lerp_(parameter.grad, 0.05)
                    update = parameter.grad.lerp(state["momentum"], 0.95)
                    update = orthogonal(update.flatten(1)).view_as(parameter)
                    parameter.add_(update, alpha=-0.2 * group["lr"] * max(update.shape[0], update[0].numel()) ** 0.5)
                    continue
                state["count"] += 1
                state["momentum"].lerp_(parameter.grad, 0.1)
                state["square"].lerp_(parameter.grad.square(), 0.01)
                mean = state["momentum"] / (1 - 0.9 ** state["count"])
                scale = (state["square"] / (1 - 0.99 ** state["count"])).sqrt_().add_(1e-10)
                parameter.addcdiv_(mean, scale, value=-group["lr"])


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """About the nearest (semi-)orthogonal matrix, by a quintic Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.mT if tall else matrix).bfloat16()
    x = x / (x.norm() + 1e-12)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrix.dtype)


class Average:
    """Exponential moving average of a network's weights, with a warm-up so that it forgets the start."""

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self.parameters = list(parameters)
        self.decay = decay
        self.shadow = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.shadow, self.parameters, 1 - decay)

    @torch.no_grad()
    def exchange(self) -> None:
        """Swap the average and the network's own weights; a second call swaps them back."""
        for own, shadow in zip(self.parameters, self.shadow, strict=True):
            keep = own.clone()
            own.copy_(shadow)
            shadow.copy_(keep)


class Run:
    """A resumable training of a network's parameters: counts steps, keeps `<name>.pt` and `<name>.csv` in a folder."""

    def __init__(
        self, name: str, model: nn.Module, optimizer: torch.optim.Optimizer, average: Average, folder: Path = CACHE
    ) -> None:
        self.model, self.optimizer, self.average = model, optimizer, average
        self.path, self.table = folder / f"{name}.pt", folder / f"{name}.csv"
        self.step, self.seconds = 0, 0.0
        self.is_stopped = False
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)
        if self.path.exists():
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            for own, saved in zip(average.shadow, state["average"], strict=True):
                own.copy_(saved)
            self.step, self.seconds = state["step"], state["seconds"]
            log.info("%s goes on from step %d", name, self.step)

    def _stop(self, *_: Any) -> None:
        self.is_stopped = True

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.shadow,
            "step": self.step,
            "seconds": self.seconds,
        }
        save_atomically(state, self.path)

    def steps(self, total: int, save_every: float = 120.0) -> Iterator[int]:
        """Numbers of the steps to make until `total` or a SIGTERM; saves every so many seconds and at the end."""
        began = saved = time.monotonic()
        spent = self.seconds
        while self.step < total and not self.is_stopped:
            yield self.step
            self.step += 1
            self.average.update(self.step)
            now = time.monotonic()
            self.seconds = spent + now - began
            if now - saved > save_every:
                self.save()
                saved = time.monotonic()
        self.save()

    def write(self, **values: float) -> None:
        """One row of the loss curve, in the log and in the table."""
        row = {"step": self.step, "seconds": round(self.seconds), **{k: f"{v:.5g}" for k, v in values.items()}}
        log.info("  ".join(f"{key} {value}" for key, value in row.items()))
        self.table.parent.mkdir(parents=True, exist_ok=True)
        is_new = not self.table.exists()
        with self.table.open("a", newline="") as file:
            writer = csv.DictWriter(file, row)
            if is_new:
                writer.writeheader()
            writer.writerow(row)
