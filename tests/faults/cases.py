"""The families of cases. Each spoils something by a seeded `Random` and returns what is wrong with what comes of it."""

from __future__ import annotations

import os
import reprlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import folder_paths
import numpy as np
import torch
from comfy_api.latest import InputImpl, Types, io
from safetensors import SafetensorError, safe_open

from faults import mutations, world
from faults.world import GOOD, SIZE, SPOILT, STREAM, WHOLE, Outcome

QUICK = {"HeliosHistoryInjection": {"width": SIZE, "height": SIZE, "frames": 33}}  # in place of defaults
short = reprlib.repr  # of a value of any depth
OTHER_DTYPES = (torch.uint8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)


class Cases:
    """Everything that is good, to spoil from."""

    def __init__(self, say: Callable[[str], None]) -> None:
        """say: is told what a case does before it does it, in case it never comes back."""
        self.say = say
        results = {
            **{name: ("load", i) for i, name in enumerate(("model", "clip", "vae"))},
            **{name: ("begin", i) for i, name in enumerate(("positive", "negative", "latent"))},
            "schedule": ("schedule", 0),
            "previous": ("sample", 0),
            "images": ("decode", 0),
        }
        outcome = world.run(world.whole_graph(), results)
        assert outcome.state == "success", outcome
        self.good = outcome.taken
        self.latents = self.good["previous"]["samples"].clone()
        start = time.monotonic()
        assert (wrong := self.good_graph()) is None, wrong
        self.seconds = time.monotonic() - start  # that a good graph takes here and now
        self.stream_latents: torch.Tensor | None = None
        self.families: dict[str, Callable[[Random], str | None]] = {
            "sockets": self.sockets,
            "files": self.files,
            "widgets": self.widgets,
            "resume": self.resume,
            "prompts": self.prompts,
            "cancel": self.cancel,
        }

    def family(self, number: int) -> str:
        return list(self.families)[number % len(self.families)]

    def run(self, seed: str, number: int) -> str | None:
        """What is wrong with case `number`; None if nothing is."""
        family = self.family(number)
        self.say(family)
        with world.watched_log() as log:
            wrong = self.families[family](Random(f"{seed}:{number}"))
        return wrong or log.found

    def good_graph(self) -> str | None:
        """Whether the next good graph still gives the same latents."""
        outcome = world.run(world.whole_graph(), WHOLE)
        if outcome.state != "success":
            return f"the next good graph fails: {outcome.kind}: {outcome.message}"
        if not torch.equal(outcome.taken["latent"]["samples"], self.latents):
            return "the next good graph gives other latents"
        return None

    def judge(self, outcome: Outcome) -> str | None:
        wrong = outcome.flaw()
        for name, value in outcome.taken.items():
            wrong = wrong or ((found := world.wrong_result(value)) and f"{name} is {found}") or None
        return wrong

    # Files

    def files(self, rng: Random) -> str | None:
        """An official folder or a single file with one or two things spoilt, from loader to frames."""
        if rng.random() < 0.2:
            return self._single_file(rng)
        folder = world.diffusers() / SPOILT
        shutil.copytree(world.diffusers() / GOOD, folder)
        weights = sorted(folder.rglob("*.safetensors"))
        try:
            for _ in range(rng.choice((1, 1, 2))):
                if rng.random() < 0.15:
                    self.say(mutations.spoil_folder(rng, folder))
                    continue
                files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size < 10**7)
                file = rng.choice(files)
                self.say(f"{file.relative_to(folder)}: {mutations.spoil_file(rng, file)}")
            outcome = world.run(world.whole_graph(SPOILT), dict(WHOLE))
            return self.judge(outcome) or (self._refused_by_library(weights) if outcome.state == "success" else None)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _single_file(self, rng: Random) -> str | None:
        file = world.diffusion_models() / "spoilt.safetensors"
        shutil.copy(world.single_file(), file)
        try:
            self.say(f"a single file: {mutations.spoil_file(rng, file)}")
            graph = world.whole_graph(model=["single", 0])
            graph["single"] = {"class_type": "HeliosModelLoader", "inputs": {"model_name": file.name, "dtype": "fp32"}}
            outcome = world.run(graph, dict(WHOLE))
            return self.judge(outcome) or (self._refused_by_library([file]) if outcome.state == "success" else None)
        finally:
            if file.is_dir():
                file.rmdir()
            else:
                file.unlink(missing_ok=True)

    def _refused_by_library(self, files: list[Path]) -> str | None:
        """Weights that we have loaded, and the library that defines the format refuses."""
        for file in files:
            try:
                with safe_open(file, framework="pt"):
                    pass
            except SafetensorError as error:
                return f"{file.name} was loaded, and the safetensors library refuses it: {error}"
        return None

    def prompts(self, rng: Random) -> str | None:
        """A prompt file spoilt, or asked for by a wrong name."""
        folder = Path(folder_paths.get_input_directory())
        file = folder / "prompts.txt"
        file.write_text("a red fox\n# no prompt\n\na blue lake\n", encoding="utf-8")
        name: Any = file.name
        try:
            if rng.random() < 0.5:
                self.say(f"{mutations.spoil_file(rng, file)}")
            elif rng.random() < 0.5:
                file.write_bytes(rng.choice((b"\xff\xfea\0", b"\0" * 100, b"a\n" * 10**6, b"\x1b[31m\n" * 9, b"\xc3")))
                self.say("other contents")
            else:
                name = mutations.plain(rng)
                self.say(f"file {short(name)}")
            graph = {
                "read": {
                    "class_type": "HeliosPromptFromFile",
                    "inputs": {"file": {"__value__": name}, "index": rng.choice((0, 1, 5, 2**32 - 1))},
                }
            }
            return self.judge(world.run(graph, {"prompt": ("read", 0)}))
        finally:
            if file.is_dir() and not file.is_symlink():
                file.rmdir()
            else:
                file.unlink(missing_ok=True)

    # Widgets and sockets

    def widgets(self, rng: Random) -> str | None:
        """A value of another kind in a widget, typed in or over a link."""
        node = rng.choice(sorted(world.OUR_NODES))
        inputs = world.OUR_NODES[node].define_schema().inputs
        names = [widget.id for widget in inputs if isinstance(widget, io.WidgetInput)]
        if not names:
            return None
        name, value = rng.choice(sorted(names)), mutations.plain(rng)
        self.say(f"{node}.{name} = {short(value)}")
        if rng.random() < 0.5:
            self.say("over a link")
            return self._node(node, {name: value})
        return self._node(node, {}, {name: {"__value__": value}})

    def sockets(self, rng: Random) -> str | None:
        """A value of another kind on a socket."""
        node = rng.choice([name for name in sorted(world.OUR_NODES) if self._sockets(name)])
        name = rng.choice(self._sockets(node))
        value, said = self._spoilt(rng, name)
        self.say(f"{node}.{name}: {said}")
        return self._node(node, {name: value})

    def _sockets(self, node: str) -> list[str]:
        inputs = world.OUR_NODES[node].define_schema().inputs
        return [socket.id for socket in inputs if not isinstance(socket, io.WidgetInput)]

    def _node(self, node: str, linked: dict[str, Any], typed: dict[str, Any] | None = None) -> str | None:
        """Run one node, its other inputs good."""
        cls = world.OUR_NODES[node]
        values: dict[str, Any] = {}
        defaults: dict[str, Any] = {}
        for widget in cls.define_schema().inputs:
            if isinstance(widget, io.Combo.Input):
                defaults[widget.id] = widget.default or next(iter(widget.options), "")
            elif isinstance(widget, io.WidgetInput):
                defaults[widget.id] = widget.default
            elif not widget.optional:
                values[widget.id] = self.good[widget.id]
        typed = {**defaults, **QUICK.get(node, {}), **(typed or {})}
        if "start_image" in linked or "video" in linked:
            values["vae"] = self.good["vae"]
        graph: world.Graph = {}
        inputs = {**typed, **world.link({**values, **linked}, graph)}
        graph["node"] = {"class_type": node, "inputs": inputs}
        results = {str(i): ("node", i) for i in range(len(cls.define_schema().outputs))}
        return self.judge(world.run(graph, results))

    def _spoilt(self, rng: Random, socket: str) -> tuple[Any, str]:
        """A value for a socket of this name, and what it is."""
        known = {"before": "positive", "start_image": "images", "video": "images"}.get(socket, socket)
        kind = rng.randrange(4)
        if kind == 0:
            value = self._thing(rng)
            return value, f"a {type(value).__name__} {short(value)}"
        if kind == 1:
            other = rng.choice(sorted(self.good))
            return self.good[other], f"the good {other}"
        tensor, said = self._tensor(rng)
        if known in ("latent", "previous"):
            return self._latent(rng, known, tensor, said)
        if known in ("positive", "negative"):
            return self._conditioning(rng, tensor, said)
        if known == "images":
            return self._pictures(rng, socket, tensor, said)
        if known == "vae":
            return self._vae(rng, tensor, said)
        return tensor, said

    def _thing(self, rng: Random) -> Any:
        things = (object(), len, b"x", (), set(), Path("x"), Ellipsis, np.zeros((2, 3)), 1j, range(3), type)
        return rng.choice(things) if rng.random() < 0.4 else mutations.plain(rng)

    def _tensor(self, rng: Random) -> tuple[torch.Tensor, str]:
        shapes = [
            tuple(rng.choice((0, 1, 2, 3, 4, 8, 9, 16, 33)) for _ in range(rng.randrange(7))),
            (1, 16, 9, 8, 8),
            (1, 33, 64, 64),
            (1, 64, 64, 3),
            (33, 64, 64, 3),
            (1, 512, 32),
            (3, 16, 18, 8, 8),
            (1, 48, 9, 8, 8),
        ]
        shape = rng.choice(shapes)
        while np.prod(shape, dtype=float) > 2e6:
            shape = shape[:-1]
        dtype = rng.choice((torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64, *OTHER_DTYPES))
        values = torch.randn(shape, generator=torch.Generator().manual_seed(rng.randrange(99))).to(dtype)
        said = f"{dtype} {shape}"
        what = rng.randrange(8)
        if what == 0 and values.is_floating_point() and values.numel() and values.dtype != torch.float8_e4m3fn:
            values.view(-1)[rng.randrange(values.numel())] = rng.choice((float("nan"), float("inf")))
            return values, f"{said} with NaN or inf"
        if what == 1 and values.ndim and values.dtype == torch.float32:
            return torch.nested.nested_tensor([values, values]), f"{said} nested"
        if what == 2:
            huge = (4096, 16, 9 * rng.choice((1, 4000)), 256, 256)  # a chunk that no machine has room for
            return torch.zeros(()).expand(huge), f"zeros of {huge}"
        if what == 3:
            return values.to("meta"), f"{said} without values"
        if what == 4 and values.dtype == torch.float32 and values.ndim:
            return values.to_sparse(), f"{said} sparse"
        return values, said

    def _latent(self, rng: Random, known: str, tensor: torch.Tensor, said: str) -> tuple[Any, str]:
        good = dict(self.good[known])
        what = rng.randrange(6)
        if what == 0:
            del good["samples"]
            return good, "LATENT without samples"
        if what == 1:
            good["helios"] = self._thing(rng)
            return good, f"LATENT with helios = {short(good['helios'])}"
        if what == 2:
            good["helios"] = self.good["previous"]["helios"]
            return {**good, "samples": tensor}, f"LATENT of {said} with another's key"
        if what == 3:
            good["samples"] = good["samples"].repeat(rng.choice((1, 3)), 1, rng.choice((1, 2)), 1, 1)
            return good, f"LATENT repeated to {tuple(good['samples'].shape)}"
        return {"samples": tensor}, f"LATENT of {said}"

    def _conditioning(self, rng: Random, tensor: torch.Tensor, said: str) -> tuple[Any, str]:
        good = self.good["positive"][0]
        what = rng.randrange(7)
        if what == 0:
            return [], "no entries"
        if what == 1:
            return [[tensor]], f"an entry without values, {said}"
        if what == 2:
            return [[good[0], self._thing(rng)]], "values that are none"
        if what == 3:
            return [good, [tensor, {}]], f"a second entry of {said}"
        if what == 4:
            return [[good[0], {**good[1], rng.choice(sorted(good[1])): self._thing(rng)}]], "another value in it"
        if what == 5:
            return [[good[0][..., :31], {}]], "31 wide"
        return [[tensor, {}]], f"an embedding of {said}"

    def _pictures(self, rng: Random, socket: str, tensor: torch.Tensor, said: str) -> tuple[Any, str]:
        if socket != "video" or rng.random() < 0.4:
            return tensor, said
        rate = rng.choice((0, -1, 1e-9, 24, 30.0, 1e9, float("nan"), float("inf"), None, "x"))
        components = Types.VideoComponents(images=tensor, frame_rate=rate)
        return InputImpl.VideoFromComponents(components), f"a VIDEO of {said} at {rate} fps"

    def _vae(self, rng: Random, tensor: torch.Tensor, said: str) -> tuple[Any, str]:
        good = self.good["vae"]

        class Other:
            latent_channels = rng.choice((4, 16, 16, 48))
            latent_dim = rng.choice((2, 3, 3))
            upscale_ratio = rng.choice((8, (lambda x: x * 4 - 3, 8, 8), (lambda x: x * 8 - 7, 8, 8)))

            def __getattr__(self, name: str) -> Any:
                return getattr(good, name)

            def encode(self, pixels: torch.Tensor) -> torch.Tensor:
                return tensor

            def decode(self, samples: torch.Tensor) -> torch.Tensor:
                return tensor

        return Other(), f"a VAE ({Other.latent_channels}, {Other.latent_dim}) that makes {said}"

    # Saved chunks, and Cancel

    def resume(self, rng: Random) -> str | None:
        """A video of two saved chunks, one of their files spoilt, made again."""
        kept = Path(folder_paths.get_output_directory()) / "kept"
        saved = Path(folder_paths.get_output_directory()) / "helios_resume"
        if self.stream_latents is None:
            self.say("the first time")
            shutil.rmtree(saved, ignore_errors=True)
            outcome = world.run(world.streaming_graph(), dict(STREAM))
            if outcome.state != "success":
                return self.judge(outcome) or f"{outcome.state} {outcome.message}"
            self.stream_latents = outcome.taken["latent"]["samples"]
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(saved, kept)
        shutil.rmtree(saved, ignore_errors=True)
        shutil.copytree(kept, saved)
        [run] = [path for path in saved.iterdir() if path.is_dir()]
        files = sorted(run.glob("*.safetensors"))
        file = rng.choice(files)
        what = rng.randrange(6)
        if what == 0:
            file.unlink()
            self.say(f"without {file.name}")
        elif what == 1:
            os.replace(files[0], files[1])
            self.say("the first chunk as the second")
        elif what == 2:
            shutil.rmtree(run)
            run.write_bytes(b"x")
            self.say("a file for the folder")
        else:
            self.say(f"{file.name}: {mutations.spoil_file(rng, file)}")
        outcome = world.run(world.streaming_graph(), dict(STREAM))
        if outcome.state == "success" and not torch.equal(outcome.taken["latent"]["samples"], self.stream_latents):
            return "a resumed run gives other latents"
        return self.judge(outcome)

    def cancel(self, rng: Random) -> str | None:
        """Cancel at any moment of a long run; the watcher's limit is that of a hang."""
        after = rng.uniform(0.01, 1.0)
        self.say(f"after {after:.2f} s")
        graph = world.whole_graph(seed=rng.randrange(99))
        graph["begin"]["inputs"]["frames"] = 33 * 2000
        outcome = world.run(graph, dict(WHOLE), cancel_after=after)
        return None if outcome.state == "interrupted" else f"Cancel without effect: {outcome.state} {outcome.message}"
