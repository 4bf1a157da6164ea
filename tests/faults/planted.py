"""Faults on purpose, one of each kind, to see the watcher notice them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from random import Random

import torch

from faults.cases import Cases
from faults.world import Outcome


class Planted(Cases):
    """The numbers of the cases are their places here."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__(say)
        planted = (self.bare_error, self.hang, self.memory, self.death, self.other_latents, self.fine)
        self.families = {plant.__name__: plant for plant in planted}

    def bare_error(self, rng: Random) -> str | None:
        return self.judge(Outcome("error", "KeyError", "'samples'"))

    def hang(self, rng: Random) -> str | None:
        time.sleep(600)
        return None

    def memory(self, rng: Random) -> str | None:
        hoard = torch.ones(2 * 2**30, dtype=torch.uint8)
        time.sleep(600)
        return str(hoard.shape)

    def death(self, rng: Random) -> str | None:
        os.kill(os.getpid(), signal.SIGBUS)
        return None

    def other_latents(self, rng: Random) -> str | None:
        self.latents = self.latents + 1
        return None

    def fine(self, rng: Random) -> str | None:
        self.latents = self.latents - 1
        return self.judge(Outcome("error", "ValueError", "The LATENT is empty. Connect Helios History Injection."))
