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
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
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


def warm_cosine(step: int, progress: float, warm_up: int = 100, last: float = 0.02) -> float:
    """Factor of the learning rate: up over `warm_up` steps, down along a cosine to `last`, as `progress` goes to 1."""
    return min(1.0, (step + 1) / warm_up) * (last + (1 - last) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal for matrices and kernels (Jordan et al. 2024), AdamW for the rest, one learning rate.

    A kernel counts as a matrix of its outputs. Steps are scaled to the size that AdamW's would have. Matrices of one
    shape go through in one batch, and the rate is a tensor, `rate`: a CUDA graph of a step reads what it is by then.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], lr: float, weight_decay: float = 0.01) -> None:
        matrices: dict[torch.Size, list[nn.Parameter]] = {}
        others = []
        for name, parameter in named:
            is_table = parameter.dim() < 2 or any(
                word in name for word in ("table", "shared", "relative", "gamma", "proj_out", "conv_out", "patch_")
            )
            if is_table:
                others.append(parameter)
            else:
                matrices.setdefault(parameter.shape, []).append(parameter)
        groups = [{"params": params, "orthogonal": True} for params in matrices.values()]
        super().__init__([*groups, {"params": others, "orthogonal": False}], {"weight_decay": weight_decay})
        self.rate = torch.full((), lr, device=others[0].device)
        for parameter in chain(others, *matrices.values()):
            self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        for parameter in others:
            self.state[parameter]["square"] = torch.zeros_like(parameter)
            self.state[parameter]["count"] = torch.zeros((), device=parameter.device)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            # Parameters without a gradient are those of branches that a step did not take.
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            states, gradients = [self.state[p] for p in parameters], [p.grad for p in parameters]
            torch._foreach_mul_(parameters, 1 - self.rate * group["weight_decay"])
            momentum = [state["momentum"] for state in states]
            if group["orthogonal"]:
                torch._foreach_lerp_(momentum, gradients, 0.05)
                updates = torch.stack(torch._foreach_lerp(gradients, momentum, 0.95)).flatten(2)
                updates = orthogonal(updates) * (0.2 * self.rate * max(updates.shape[1:]) ** 0.5)
                torch._foreach_sub_(parameters, [u.view_as(p) for u, p in zip(updates, parameters, strict=True)])
                continue
            counts, squares = [state["count"] for state in states], [state["square"] for state in states]
            torch._foreach_add_(counts, 1)
            torch._foreach_lerp_(momentum, gradients, 0.1)
            torch._foreach_lerp_(squares, torch._foreach_mul(gradients, gradients), 0.01)
            count = counts[0]  # they all take the same steps
            scales = torch._foreach_sqrt(squares)
            torch._foreach_mul_(scales, (1 - 0.99**count).rsqrt())
            torch._foreach_add_(scales, 1e-10)
            updates = torch._foreach_div(momentum, scales)
            torch._foreach_mul_(updates, self.rate / (1 - 0.9**count))
            torch._foreach_sub_(parameters, updates)


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """About the nearest (semi-)orthogonal matrices, (N, rows, columns), by a quintic Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-12)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class TrainStep:
    """One step of training, called with a batch of tensors of always the same shapes: the loss, before the step.

    On a card it becomes a CUDA graph after three calls: a network this small otherwise waits for its launches.
    """

    uses_graphs = True

    def __init__(self, loss_of: Callable[..., Tensor], parameters: Iterable[nn.Parameter], optimizer: Muon) -> None:
        self.loss_of, self.parameters, self.optimizer = loss_of, list(parameters), optimizer
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *batch: Tensor) -> Tensor:
        if not (batch[0].is_cuda and self.uses_graphs):
            return self._step(*batch)
        self.calls += 1
        if self.calls <= 3:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                loss = self._step(*batch)
            torch.cuda.current_stream().wait_stream(stream)
            return loss
        if self.graph is None:
            self.batch = [part.clone() for part in batch]
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.loss = self._step(*self.batch)
        for own, part in zip(self.batch, batch, strict=True):
            own.copy_(part)
        self.graph.replay()
        return self.loss.clone()

    def _step(self, *batch: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.loss_of(*batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        return loss.detach()


class Average:
    """Exponential moving average of a network's weights, with a warm-up so that it forgets the start."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], decay: float) -> None:
        self.parameters = dict(named)
        self.decay = decay
        self.shadow = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.shadow.values()), list(self.parameters.values()), 1 - decay)

    @torch.no_grad()
    def exchange(self) -> None:
        """Swap the average and the network's own weights; a second call swaps them back."""
        for name, own in self.parameters.items():
            keep = own.clone()
            own.copy_(self.shadow[name])
            self.shadow[name].copy_(keep)


class Run:
    """A resumable training of a network's parameters: counts steps, keeps `<name>.pt` and `<name>.csv` in a folder.

    It ends after so many steps, or after so many seconds, whichever comes first; `progress` goes from 0 to 1.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        optimizer: Muon,
        average: Average,
        folder: Path,
        steps: int,
        seconds: float = math.inf,
    ) -> None:
        self.model, self.optimizer, self.average = model, optimizer, average
        self.path, self.table = folder / f"{name}.pt", folder / f"{name}.csv"
        self.step, self.seconds = 0, 0.0
        self.total, self.limit = steps, seconds
        self.is_stopped = False
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)
        if self.path.exists():
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            for name, saved in state["average"].items():
                average.shadow[name].copy_(saved)
            self.step, self.seconds = state["step"], state["seconds"]
            log.info("%s goes on from step %d", name, self.step)
            if self.progress >= 1:
                log.info("that is all its steps: a further round wants another --folder")

    @property
    def progress(self) -> float:
        return max(self.step / self.total, self.seconds / self.limit)

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

    def steps(self, rate: float, save_every: float = 120.0) -> Iterator[int]:
        """Numbers of the steps to make, until the end; sets the optimizer's rate, whose peak is `rate`, and saves.

        After a SIGTERM the program ends, once it has saved.
        """
        began = saved = time.monotonic()
        spent = self.seconds
        while self.progress < 1 and not self.is_stopped:
            self.optimizer.rate.fill_(rate * warm_cosine(self.step, self.progress))
            yield self.step
            self.step += 1
            self.average.update(self.step)
            now = time.monotonic()
            self.seconds = spent + now - began
            if now - saved > save_every:
                self.save()
                saved = time.monotonic()
        self.save()
        log.info("stopped at step %d after %.0f s", self.step, self.seconds)
        if self.is_stopped:
            sys.exit(128 + signal.SIGTERM)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """With the average in place of the network's own weights."""
        self.average.exchange()
        try:
            yield
        finally:
            self.average.exchange()

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
