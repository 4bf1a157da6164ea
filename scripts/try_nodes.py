"""Try every node of a ComfyUI that takes a MODEL or a LATENT on tiny Helios models, and write docs/compatibility.md."""

from __future__ import annotations

import argparse
import copy
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness.client import ExecutionFailed, PromptRejected, Run, run_workflow
from harness.host import ROOT, Host
from harness.models import make_tiny_models
from harness.small import find, last, small_api, with_latents
from harness.tiny import TINY

BUILD = ROOT / "build" / "compatibility"
DOCUMENT = ROOT / "docs" / "compatibility.md"
OURS = "custom_nodes.ComfyUI-Helios"
VARIANTS = {"Base, guided": "helios_t2v_base", "Distilled": "helios_t2v_distilled"}
TIMEOUT = 300
TRIED = "tried"  # id of the node in question
# Sockets that a small graph can feed: the node that does, its inputs and its output.
SOURCES: dict[str, tuple[str, dict[str, Any], int]] = {
    "GUIDER": ("BasicGuider", {"model": "MODEL", "conditioning": "CONDITIONING"}, 0),
    "IMAGE": ("EmptyImage", {"width": 128, "height": 64, "batch_size": 1, "color": 0x336699}, 0),
    "LATENT_OPERATION": ("LatentOperationTonemapReinhard", {"multiplier": 1.0}, 0),
    "MASK": ("SolidMask", {"value": 1.0, "width": 128, "height": 64}, 0),
    "NOISE": ("RandomNoise", {"noise_seed": 1}, 0),
    "SAMPLER": ("KSamplerSelect", {"sampler_name": "euler"}, 0),
    "SIGMAS": ("KarrasScheduler", {"steps": 2, "sigma_max": 1.0, "sigma_min": 0.1, "rho": 7.0}, 0),
}
WIDGETS = {"INT": 1, "FLOAT": 1.0, "STRING": "", "BOOLEAN": False}
INTRODUCTION = """# Nodes of ComfyUI on a Helios MODEL or LATENT

Every node of ComfyUI {version} that takes a MODEL or a LATENT, with its default settings, on tiny random weights at
128x64. `python scripts/try_nodes.py` writes this page, for any other ComfyUI as well.

- **changed**: it works, and the video is another one than without it.
- **unchanged**: the video is the same. With its defaults the node does nothing (as merging a model with itself), or it
  does nothing to this model.
- **refused**: we say in one sentence what does not go together, before or while the video is made.
- **failed**: the node itself ends in an error, in most cases since it reaches into the layers of another model.
- **ran**: it came to its end; there is no video to compare.
- **not tried**: it needs something that the small graph does not have.

Nodes of other packs that reach into the layers of Wan, Flux or a U-Net by their names (TeaCache, first-block caches,
NAG, Enhance-A-Video, RifleX and the like) fail in the same way: Helios has layers of its own. Those that only work on
what the model returns, such as guidance functions, work.
"""


@dataclass(frozen=True)
class Outcome:
    """What came of a node: a word of the introduction, and what it said."""

    word: str
    said: str = ""


def make_models() -> Path:
    """Tiny models of every variant, and a LoRA for them."""
    models = make_tiny_models(BUILD / "models")
    (models / "loras").mkdir(exist_ok=True)
    name = "transformer.blocks.0.attn1.to_q"
    width = int(TINY["num_attention_heads"] * TINY["attention_head_dim"])
    lora = {f"{name}.lora_A.weight": torch.ones(1, width), f"{name}.lora_B.weight": torch.ones(width, 1)}
    save_file(lora, models / "loras" / "tiny.safetensors")
    return models


class NotTriedError(ValueError):
    """A node that the small graph cannot feed."""


def takes(node: Mapping[str, Any], kind: str) -> bool:
    return any(kind in str(spec[0]).split(",") for _, spec in _inputs(node))


def _inputs(node: Mapping[str, Any], groups: tuple[str, ...] = ("required", "optional")) -> Iterator[tuple[str, list]]:
    for group in groups:
        yield from (node["input"].get(group) or {}).items()


class Trial:
    """A small graph of one variant on a server, and its latents as they are without the node in question."""

    def __init__(self, host: Host, info: Mapping[str, Any], workflow: str) -> None:
        self.host, self.info = host, info
        steps = {"steps": 4, "steps_stage_1": 2, "steps_stage_2": 2, "steps_stage_3": 2}
        self.api = with_latents(small_api(workflow, dict(info), frames=33, seed=3, **steps), "compatibility")
        self.sampler = last(self.api, "HeliosChunkedSampler")
        loader, text = find(self.api, "HeliosDiffusersLoader"), find(self.api, "HeliosTextEncode")
        self.links = {"MODEL": [loader, 0], "CLIP": [loader, 1], "VAE": [loader, 2], "CONDITIONING": [text, 1]}
        self.links["LATENT"] = [self.sampler, 0]
        self.expected = self.latents(self.run(self.api))

    def run(self, api: dict[str, Any]) -> Run:
        return run_workflow(self.host.url, api, timeout=TIMEOUT)

    def latents(self, run: Run) -> Tensor:
        """What Save Latent has saved in a run."""
        [file] = [entry for entry in run.files() if entry["filename"].endswith(".latent")]
        return load_file(self.host.output / file["subfolder"] / file["filename"])["latent_tensor"]

    def with_node(self, name: str) -> dict[str, Any]:
        """The graph with a node of this name in it, fed and at its defaults, and not connected to anything yet."""
        api = copy.deepcopy(self.api)
        api[TRIED] = {"class_type": name, "inputs": {}}
        for group in ("required", "optional"):
            for socket, spec in _inputs(self.info[name], (group,)):
                kind = spec[0] if isinstance(spec[0], list) else str(spec[0]).split(",")
                wanted = not isinstance(spec[0], list) and bool({"MODEL", "LATENT"} & set(kind))
                if group == "required" or wanted:
                    api[TRIED]["inputs"][socket] = self.value(api, spec)
        return api

    def value(self, api: dict[str, Any], spec: list) -> Any:
        """A widget's default, or a link to what feeds a socket, with the nodes that takes added to the graph."""
        kind, options = (*spec, {})[:2]
        choices = kind if isinstance(kind, list) else options.get("options")
        if choices is not None:
            if not choices:
                raise NotTriedError("needs a file")
            return options.get("default", choices[0])
        if kind in WIDGETS:
            return options.get("default", WIDGETS[kind])
        for one in kind.split(","):
            if one in self.links:
                return self.links[one]
            if one in SOURCES and SOURCES[one][0] in self.info:
                source, inputs, output = SOURCES[one]
                linked = {key: self.links.get(str(value), value) for key, value in inputs.items()}
                api[one] = {"class_type": source, "inputs": linked}
                return [one, output]
        raise NotTriedError(f"needs a {kind}")

    def on_model(self, name: str) -> Outcome:
        """A node that returns a MODEL, between loader and sampler."""
        api = self.with_node(name)
        api[self.sampler]["inputs"]["model"] = [TRIED, self.info[name]["output"].index("MODEL")]
        for socket, link in api[TRIED]["inputs"].items():
            if link == self.links["LATENT"]:  # of the sampler that is to come after it
                api[TRIED]["inputs"][socket] = api[self.sampler]["inputs"]["latent"]
        return self.compared(api)

    def on_latent(self, name: str) -> Outcome:
        """A node that returns a LATENT, after the sampler."""
        api = self.with_node(name)
        api["save"]["inputs"]["samples"] = [TRIED, self.info[name]["output"].index("LATENT")]
        return self.compared(api)

    def compared(self, api: dict[str, Any]) -> Outcome:
        found = self.latents(self.run(api))
        if not found.isfinite().all():
            return Outcome("failed", "the latents are not finite")
        return Outcome("unchanged" if torch.equal(found, self.expected) else "changed")

    def to_its_end(self, name: str) -> Outcome:
        """Any other node: only whether it runs."""
        api = self.with_node(name)
        del api["save"]
        if not self.info[name]["output_node"]:
            api["show"] = {"class_type": "PreviewAny", "inputs": {"source": [TRIED, 0]}}
        self.run(api)
        return Outcome("ran")

    def outcome(self, name: str) -> Outcome:
        outputs = self.info[name]["output"]
        on_model = "MODEL" in outputs and takes(self.info[name], "MODEL")
        attempt = self.on_model if on_model else self.on_latent if "LATENT" in outputs else self.to_its_end
        try:
            return attempt(name)
        except NotTriedError as error:
            return Outcome("not tried", str(error))
        except PromptRejected as error:
            return Outcome("not tried", first_sentence(str(error).partition(": ")[2]))
        except ExecutionFailed as error:
            said = first_sentence(error.details.get("exception_message", str(error)))
            by_us = str(error.details.get("node_type")).startswith("Helios") or "Helios" in said
            refused = by_us and error.details.get("exception_type") == "ValueError"
            return Outcome("refused" if refused else "failed", said)
        except TimeoutError:
            self.host.interrupt()
            return Outcome("failed", f"not done after {TIMEOUT} s")


def first_sentence(message: str) -> str:
    return re.split(r"(?<=\.) |\n", message.strip(), maxsplit=1)[0]


def document(version: str, info: Mapping[str, Any], outcomes: Mapping[str, Mapping[str, Outcome]]) -> str:
    """The page: a table of the nodes that take a MODEL, and one of those that take a LATENT alone."""
    parts = [INTRODUCTION.format(version=version)]
    for title, kind in (("MODEL", "MODEL"), ("LATENT alone", "LATENT")):
        names = [name for name in outcomes if takes(info[name], "MODEL") == (kind == "MODEL")]
        parts.append(f"\n## Nodes that take a {title}\n\n| node | {' | '.join(VARIANTS)} | |\n|---|---|---|---|\n")
        parts += [row(name, outcomes[name]) for name in names]
    return "".join(parts)


def row(name: str, outcomes: Mapping[str, Outcome]) -> str:
    said = list(dict.fromkeys(outcome.said for outcome in outcomes.values() if outcome.said))
    words = " | ".join(outcome.word for outcome in outcomes.values())
    text = "; ".join(said).replace("|", "\\|").replace("<", "&lt;")
    return f"| {name} | {words} | {text} |\n"


def candidates(info: Mapping[str, Any]) -> list[str]:
    """Names of the host's nodes that take a MODEL or a LATENT."""
    names = [name for name, node in info.items() if node["python_module"] != OURS]
    return sorted(name for name in names if takes(info[name], "MODEL") or takes(info[name], "LATENT"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("nodes", nargs="*", help="names of nodes; no page is written then")
    parser.add_argument("--target", type=Path, default=DOCUMENT)
    options = parser.parse_args()
    with Host(BUILD / "comfyui", models=make_models()) as host:
        version = host.get("/system_stats")["system"]["comfyui_version"]
        info = host.get("/object_info")
        trials = {title: Trial(host, info, workflow) for title, workflow in VARIANTS.items()}
        outcomes: dict[str, dict[str, Outcome]] = {}
        for name in options.nodes or candidates(info):
            outcomes[name] = {title: trial.outcome(name) for title, trial in trials.items()}
            print(row(name, outcomes[name]), end="", flush=True)
    if not options.nodes:
        options.target.write_text(document(version, info, outcomes), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
