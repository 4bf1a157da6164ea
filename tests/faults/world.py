"""The host around the cases: tiny weights, our nodes, and graphs run as its server runs them, without the server."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import comfy.model_management
import execution
import folder_paths
import torch
from safetensors.torch import load_file, save_file

import nodes
from comfyui_helios.helios_core.checkpoint import CONFIG_KEY
from comfyui_helios.helios_core.config import TransformerConfig
from comfyui_helios.nodes import HeliosExtension
from faults.verdict import flaw
from support.quantised import block_layers, write_scaled

GOOD, SPOILT = "Helios-Good", "Helios-Spoilt"  # folders below models/diffusers
SIZE = 64  # pixels
CACHE = {"ram": 0, "ram_inactive": 0}  # of the host; newer ones (0.33) ask for the second
Graph = dict[str, dict[str, Any]]


class Anything(str):
    """A socket type that fits every other."""

    def __ne__(self, other: object) -> bool:
        return False


class Given:
    """Hands out a value of any kind, as some other pack's node might."""

    RETURN_TYPES = (Anything("*"),)
    FUNCTION, CATEGORY = "give", "test"
    values: ClassVar[dict[str, Any]] = {}

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # the host's name
        return {"required": {"name": ("STRING", {})}}

    def give(self, name: str) -> tuple[Any]:
        return (self.values[name],)


class Taken:
    """Where a graph ends."""

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION, CATEGORY = "take", "test"
    values: ClassVar[dict[str, Any]] = {}

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # the host's name
        return {"required": {"value": (Anything("*"), {}), "name": ("STRING", {})}}

    def take(self, value: Any, name: str) -> tuple[()]:
        self.values[name] = value
        return ()


class Server:
    """As much of the host's server as its executor asks for."""

    client_id = last_node_id = last_prompt_id = None

    def send_sync(self, *message: Any) -> None:
        pass


@dataclass
class Outcome:
    """How a graph ended: "success", "refused" by the host's own check, "error" or "interrupted"."""

    state: str
    kind: str = ""  # of the error, its full name
    message: str = ""
    taken: dict[str, Any] = field(default_factory=dict)

    def flaw(self) -> str | None:
        """What is wrong with it; None for a sentence, and for success, whose results are the case's to judge."""
        wrong = flaw(self.kind, self.message) if self.state == "error" else None
        return wrong and f"{wrong}: {self.kind}: {self.message.strip()[:600]}"


OUR_NODES: dict[str, Any] = {}


def set_up(good: Path) -> None:
    """Our nodes into the host, and a folder of tiny weights into its models."""
    for node in asyncio.run(HeliosExtension().get_node_list()):
        OUR_NODES[node.GET_SCHEMA().node_id] = node
    nodes.NODE_CLASS_MAPPINGS.update({**OUR_NODES, "Given": Given, "Taken": Taken})
    shutil.copytree(good, diffusers() / GOOD)
    diffusion_models().mkdir(parents=True, exist_ok=True)
    shards = sorted((good / "transformer").glob("*.safetensors"))
    tensors = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    save_file(tensors, single_file(), {CONFIG_KEY: (good / "transformer" / "config.json").read_text()})
    config = TransformerConfig.from_dict(json.loads((good / "transformer" / "config.json").read_text()))
    write_scaled(quantised_file(), tensors, block_layers(tensors), config=config, kind="marks")
    for name in (folder_paths.get_input_directory(), folder_paths.get_temp_directory()):
        Path(name).mkdir(parents=True, exist_ok=True)


def diffusers() -> Path:
    return Path(folder_paths.get_folder_paths("diffusers")[0])


def diffusion_models() -> Path:
    return Path(folder_paths.get_folder_paths("diffusion_models")[-1])


def single_file() -> Path:
    """The good transformer in one file that brings its own configuration."""
    return diffusion_models() / "good.safetensors"


def quantised_file() -> Path:
    """The same in scaled fp8."""
    return diffusion_models() / "quantised.safetensors"


def give(value: Any) -> tuple[str, Graph]:
    """A node that hands out this value, and its id."""
    name = uuid.uuid4().hex
    Given.values[name] = value
    return name, {name: {"class_type": "Given", "inputs": {"name": name}}}


def run(graph: Graph, results: dict[str, tuple[str, int]], cancel_after: float | None = None) -> Outcome:
    """Check a graph and run it as the server does, up to these results: name -> (node, output)."""
    for name, link in results.items():
        graph[f"take {name}"] = {"class_type": "Taken", "inputs": {"value": list(link), "name": name}}
    Taken.values.clear()
    prompt_id = uuid.uuid4().hex
    valid, error, outputs, node_errors = asyncio.run(execution.validate_prompt(prompt_id, graph, None))
    if not valid:
        return _refused(error, node_errors)
    executor = execution.PromptExecutor(Server(), cache_type=execution.CacheType.CLASSIC, cache_args=CACHE)
    timer = threading.Timer(cancel_after or 0, comfy.model_management.interrupt_current_processing)
    if cancel_after is not None:
        timer.start()
    try:
        executor.execute(graph, prompt_id, {}, outputs)
    finally:
        timer.cancel()
    for event, data in executor.status_messages:
        if event == "execution_error":
            return Outcome("error", data["exception_type"], data["exception_message"])
        if event == "execution_interrupted":
            return Outcome("interrupted")
    return Outcome("success", taken=dict(Taken.values))


def _refused(error: dict[str, Any], node_errors: dict[str, Any]) -> Outcome:
    """The host's own check has its own words; what a function of ours raised or answered there counts as ours."""
    for node in node_errors.values():
        for reason in node["errors"]:
            if reason["type"] == "custom_validation_failed":
                return Outcome("error", "ValueError", reason["details"].partition(" - ")[2])
            if reason["type"].startswith("exception_during"):
                return Outcome("error", reason["extra_info"]["exception_type"], reason["details"])
    return Outcome("refused", message=error["details"])


def link(values: dict[str, Any], graph: Graph) -> dict[str, Any]:
    """Inputs that get these values over links; the nodes that hand them out go into the graph."""
    links = {}
    for name, value in values.items():
        source, node = give(value)
        graph.update(node)
        links[name] = [source, 0]
    return links


def whole_graph(folder: str = GOOD, **sampler: Any) -> Graph:
    """From a folder below models/diffusers to frames."""
    prompt = {"clip": ["load", 1], "positive": "a red fox", "negative": "blurry"}
    size = {"width": SIZE, "height": SIZE, "frames": 33, "batch_size": 1}
    return {
        "load": {"class_type": "HeliosDiffusersLoader", "inputs": {"folder": folder, "dtype": "fp32"}},
        "text": {"class_type": "HeliosTextEncode", "inputs": prompt},
        "begin": {
            "class_type": "HeliosHistoryInjection",
            "inputs": {"positive": ["text", 0], "negative": ["text", 1], **size},
        },
        "schedule": {
            "class_type": "HeliosDistilledSchedule",
            "inputs": {
                **{f"steps_stage_{i}": 1 for i in (1, 2, 3)},
                "amplify_first_chunk": False,
                "shift_level": "stage",
            },
        },
        "sample": {
            "class_type": "HeliosChunkedSampler",
            "inputs": {
                "model": ["load", 0],
                "positive": ["begin", 0],
                "negative": ["begin", 1],
                "latent": ["begin", 2],
                "schedule": ["schedule", 0],
                "seed": 5,
                **sampler,
            },
        },
        "decode": {
            "class_type": "HeliosChunkedVAEDecode",
            "inputs": {"latent": ["sample", 0], "vae": ["load", 2], "trim": False},
        },
    }


WHOLE = {"latent": ("sample", 0), "images": ("decode", 0)}


def streaming_graph(frames: int = 66) -> Graph:
    """A video of two chunks that are saved."""
    graph = whole_graph()
    graph["begin"]["inputs"]["frames"] = frames
    inputs = {**graph.pop("sample")["inputs"], "vae": ["load", 2], "fps": 24.0, "crf": 18, "bit_depth": "8"}
    graph["stream"] = {"class_type": "HeliosStreamVideo", "inputs": {**inputs, "trim": False, "resume": True}}
    del graph["decode"]
    return graph


STREAM = {"latent": ("stream", 1)}


def wrong_result(value: Any) -> str | None:
    """What is wrong with what a graph gave out: LATENT and IMAGE must be whole and finite."""
    if isinstance(value, dict) and "samples" in value:
        value = value["samples"]
    if isinstance(value, torch.Tensor):
        if not value.numel():
            return f"an empty result of the shape {tuple(value.shape)}"
        if value.is_floating_point() and not torch.stack(value.aminmax()).isfinite().all():
            return "a result that is not finite"
    return None


class UnprintableLog(logging.Handler):
    """Notices log lines that the host's log, which is UTF-8, breaks on."""

    found: str | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if str(record.msg).startswith("  - "):  # of the host's own check, about what is typed in
            return
        try:
            self.format(record).encode()
        except UnicodeEncodeError:
            self.found = f"a log line that cannot be written: {ascii(record.getMessage())[:300]}"


@contextmanager
def watched_log() -> Iterator[UnprintableLog]:
    handler = UnprintableLog()
    logging.getLogger().addHandler(handler)
    try:
        yield handler
    finally:
        logging.getLogger().removeHandler(handler)
