"""Try every node of a ComfyUI that takes a MODEL or a LATENT on tiny Helios models, and write docs/compatibility.md.

A run is of one ComfyUI, and keeps what came of its nodes in build/compatibility/outcomes. The page is made of all that
are there, with a line of its own for what differs between them.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
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
from harness.workflow import DYNAMIC

BUILD = ROOT / "build" / "compatibility"
OUTCOMES = BUILD / "outcomes"
DOCUMENT = ROOT / "docs" / "compatibility.md"
OURS = "ComfyUI-Helios"
MODELS, LATENTS = "Nodes that take a MODEL", "Nodes that take a LATENT alone"
VARIANTS = {"Base, guided": "helios_t2v_base", "Distilled": "helios_t2v_distilled"}
TIMEOUT = 300
LORA = "tiny.safetensors"
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
# Where the defaults do nothing, at least on a network of two blocks.
SETTINGS: dict[str, dict[str, Any]] = {
    "ApplyFBCacheOnModel": {"residual_diff_threshold": 0.1},
    "Lora Loader Stack (rgthree)": {"lora_01": LORA},
    "PathchSageAttentionKJ": {"sage_attention": "auto"},
    "Power Lora Loader (rgthree)": {"lora_1": {"on": True, "lora": LORA, "strength": 1.0}},
    "SkipLayerGuidanceWanVideo": {"blocks": "0"},
}
WIDGETS = {"INT": 1, "FLOAT": 1.0, "STRING": "", "BOOLEAN": False}
INTRODUCTION = """# Nodes of ComfyUI on a Helios MODEL or LATENT

Every node of ComfyUI {versions} that takes a MODEL or a LATENT, on tiny random weights at 128x64;
behind them, nodes of other packs that take a MODEL and return one. With their default settings, but for a few that do
nothing then. Where no version of ComfyUI is named, the outcome is the same on all of these.

`python scripts/try_nodes.py` tries those of any ComfyUI, with `--packs` those of packs, and writes this page.

- **changed**: it works, and the video is another one than without it.
- **unchanged**: the video is the same. With its defaults the node does nothing (as merging a model with itself, or
  EasyCache and LazyCache, which skip steps of longer runs), or it does nothing to this model.
- **refused**: we say in one sentence what does not go together, before or while the video is made.
- **failed**: the node itself ends in an error, in most cases since it reaches into the layers of another model.
- **ran**: it came to its end; there is no video to compare.
- **not tried**: it needs something that the small graph does not have.
"""


@dataclass(frozen=True)
class Outcome:
    """What came of a node: a word of the introduction, and what it said."""

    word: str
    said: str = ""


Results = dict[str, dict[str, dict[str, Outcome]]]  # of one ComfyUI: title of a table -> node -> variant -> outcome


def make_models() -> Path:
    """Tiny models of every variant, and a LoRA for them."""
    models = make_tiny_models(BUILD / "models")
    (models / "loras").mkdir(exist_ok=True)
    name = "transformer.blocks.0.attn1.to_q"
    width = int(TINY["num_attention_heads"] * TINY["attention_head_dim"])
    lora = {f"{name}.lora_A.weight": torch.ones(1, width), f"{name}.lora_B.weight": torch.ones(width, 1)}
    save_file(lora, models / "loras" / LORA)
    return models


class NotTriedError(ValueError):
    """A node that the small graph cannot feed."""


def takes(node: Mapping[str, Any], kind: str) -> bool:
    groups = (node["input"].get(group) or {} for group in ("required", "optional"))
    return any(kind in str(spec[0]).split(",") for group in groups for spec in group.values())


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
        [self.expected] = self.latents(self.run(self.api))

    def run(self, api: dict[str, Any]) -> Run:
        return run_workflow(self.host.url, api, timeout=TIMEOUT)

    def latents(self, run: Run) -> list[Tensor]:
        """What Save Latent has saved in a run: one, or where a node has made a list, all of it."""
        files = [entry for entries in run.outputs["save"].values() for entry in entries]
        return [load_file(self.host.output / file["subfolder"] / file["filename"])["latent_tensor"] for file in files]

    def with_node(self, name: str) -> dict[str, Any]:
        """The graph with a node of this name in it, fed and at its defaults, and not connected to anything yet."""
        api = copy.deepcopy(self.api)
        api[TRIED] = {"class_type": name, "inputs": {}}
        self.fill(api, self.info[name]["input"])
        api[TRIED]["inputs"] |= SETTINGS.get(name, {})
        return api

    def fill(self, api: dict[str, Any], inputs: Mapping[str, Any], prefix: str = "") -> None:
        """Give the node in question what it must have, and every MODEL and LATENT it can take."""
        for group in ("required", "optional"):
            for socket, spec in (inputs.get(group) or {}).items():
                kind = spec[0] if isinstance(spec[0], list) else str(spec[0]).split(",")
                wanted = not isinstance(spec[0], list) and bool({"MODEL", "LATENT"} & set(kind))
                if spec[0] == DYNAMIC:
                    first = spec[1]["options"][0]
                    api[TRIED]["inputs"][prefix + socket] = first["key"]
                    self.fill(api, first["inputs"], f"{prefix}{socket}.")
                elif group == "required" or wanted:
                    api[TRIED]["inputs"][prefix + socket] = self.value(api, spec)

    def value(self, api: dict[str, Any], spec: list) -> Any:
        """A widget's default, or a link to what feeds a socket, with the nodes that takes added to the graph."""
        kind, options = (*spec, {})[:2]
        choices = kind if isinstance(kind, list) else options.get("options")
        if choices is not None:
            if not choices:
                raise NotTriedError("needs a file")
            return LORA if LORA in choices else options.get("default", choices[0])
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
        if not all(latents.isfinite().all() for latents in found):
            return Outcome("failed", "the latents are not finite")
        same = len(found) == 1 and torch.equal(found[0], self.expected)
        return Outcome("unchanged" if same else "changed")

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
            message = error.details.get("exception_message", str(error))
            ours = re.search(r"Helios(?!Network)", message)  # our sentences name Helios, errors of Python the class
            refused = ours and error.details.get("exception_type") == "ValueError"
            return Outcome("refused" if refused else "failed", first_sentence(message))
        except TimeoutError:
            self.host.interrupt()
            return Outcome("failed", f"not done after {TIMEOUT} s")


def first_sentence(message: str) -> str:
    return re.split(r"(?<=\.) |\n", message.strip(), maxsplit=1)[0]


def candidates(info: Mapping[str, Any]) -> dict[str, list[str]]:
    """Names of the host's nodes, by table."""
    nodes = {name: node for name, node in sorted(info.items()) if not node["python_module"].startswith("custom_nodes.")}
    on_models = [name for name, node in nodes.items() if takes(node, "MODEL")]
    on_latents = [name for name, node in nodes.items() if takes(node, "LATENT") and name not in on_models]
    return {MODELS: on_models, LATENTS: on_latents}


def of_pack(info: Mapping[str, Any], pack: str) -> list[str]:
    """Names of a pack's nodes that take a MODEL and return one."""
    nodes = {name: node for name, node in sorted(info.items()) if node["python_module"] == f"custom_nodes.{pack}"}
    return [name for name, node in nodes.items() if takes(node, "MODEL") and "MODEL" in node["output"]]


def document(results: Mapping[str, Results]) -> str:
    """The page, of what came of the nodes on each ComfyUI, the oldest first."""
    parts = [INTRODUCTION.format(versions=" and ".join(results))]
    for title in dict.fromkeys(title for tables in results.values() for title in tables):
        columns = ["node", "ComfyUI", *VARIANTS, ""]
        parts.append(f"\n## {title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n")
        there = {version: tables[title] for version, tables in results.items() if title in tables}
        for name in sorted({name for outcomes in there.values() for name in outcomes}):
            parts += rows(name, {version: outcomes.get(name) for version, outcomes in there.items()})
    return "".join(parts)


def rows(name: str, by_version: Mapping[str, dict[str, Outcome] | None]) -> list[str]:
    """A node's line, or one for each outcome where it is not the same on every ComfyUI, or not on all."""
    versions: dict[tuple[tuple[str, Outcome], ...], list[str]] = {}
    for version, outcomes in by_version.items():
        if outcomes is not None:
            versions.setdefault(tuple(outcomes.items()), []).append(version)
    return [row(name, dict(came), () if of == list(by_version) else of) for came, of in versions.items()]


def row(name: str, outcomes: Mapping[str, Outcome], versions: Sequence[str] = ()) -> str:
    said = list(dict.fromkeys(outcome.said for outcome in outcomes.values() if outcome.said))
    words = " | ".join(outcome.word for outcome in outcomes.values())
    text = "; ".join(said).replace("|", "\\|").replace("<", "&lt;")
    return f"| {name} | {', '.join(versions)} | {words} | {text} |\n"


def read_results() -> dict[str, Results]:
    """What is known of each ComfyUI, the oldest first."""
    results = {}
    for file in sorted(OUTCOMES.glob("*.json"), key=lambda file: [int(part) for part in file.stem.split(".")]):
        known = json.loads(file.read_text(encoding="utf-8"))
        results[file.stem] = {
            title: {
                name: {variant: Outcome(**outcome) for variant, outcome in outcomes.items()}
                for name, outcomes in table.items()
            }
            for title, table in known.items()
        }
    return results


def keep_results(version: str, found: Results) -> None:
    """Write these tables of a ComfyUI down; those of other runs stay."""
    OUTCOMES.mkdir(parents=True, exist_ok=True)
    known = {**read_results().get(version, {}), **found}
    text = json.dumps(known, default=asdict, indent=1)
    (OUTCOMES / f"{version}.json").write_text(text, encoding="utf-8")


def link_packs(host: Host, packs: Sequence[Path]) -> None:
    """Have these packs beside ours, and no others."""
    folder = host.base / "custom_nodes"
    for link in folder.iterdir():
        if link.is_symlink() and link.name != OURS:
            link.unlink()
    for pack in packs:
        (folder / pack.name).symlink_to(pack.resolve(), target_is_directory=True)


def with_version(pack: Path) -> str:
    """The title of a pack's table."""
    file = pack / "pyproject.toml"
    version = tomllib.loads(file.read_text(encoding="utf-8"))["project"]["version"] if file.is_file() else ""
    return f"{pack.name} {version}".strip()


def not_imported(host: Host, pack: Path) -> str | None:
    """What the host's log says of a pack that it could not import."""
    said = r"(?:Cannot import|Error while calling comfy_entrypoint in) \S*/"
    found = re.search(rf"{said}{re.escape(pack.name)}(?: module for custom nodes)?: (.*)", host.log.read_text())
    return found and re.sub(r" \(/.*?\)", "", found[1])  # without the path of a file


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("nodes", nargs="*", help="names of nodes; no page is written then")
    parser.add_argument(
        "--packs", nargs="*", type=Path, default=[], help="folders of packs: their nodes, not ComfyUI's"
    )
    parser.add_argument("--target", type=Path, default=DOCUMENT)
    options = parser.parse_args()
    host = Host(BUILD / "comfyui", models=make_models())
    link_packs(host, options.packs)
    with host:
        version = host.get("/system_stats")["system"]["comfyui_version"]
        info = host.get("/object_info")
        trials = {title: Trial(host, info, workflow) for title, workflow in VARIANTS.items()}

        def tried(names: Sequence[str]) -> dict[str, dict[str, Outcome]]:
            outcomes = {}
            for name in names:
                outcomes[name] = {title: trial.outcome(name) for title, trial in trials.items()}
                print(row(name, outcomes[name]), end="", flush=True)
            return outcomes

        if options.nodes:
            tried(options.nodes)
            return 0
        found = {}
        for pack in options.packs:
            found[with_version(pack)] = tried(of_pack(info, pack.name))
            if why := not_imported(host, pack):
                found[with_version(pack)] = {
                    "(the pack)": dict.fromkeys(VARIANTS, Outcome("failed", f"no import: {why}"))
                }
        if not options.packs:
            found = {title: tried(names) for title, names in candidates(info).items()}
        keep_results(version, found)
    options.target.write_text(document(read_results()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
