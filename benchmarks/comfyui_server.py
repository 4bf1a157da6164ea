"""A ComfyUI to measure: its server, what it is given to load, and what is seen of a run."""

from __future__ import annotations

import re
import shutil
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import decode
import torch
from attention import first_line
from card import device
from measure import ROOT, Peak
from memory_gpu import GB, TINY, save_whole, write_weights
from parts import MissingError, require

from harness.host import Host, HostError, comfyui_path
from harness.small import find, small_api
from helios_core.checkpoint import published_name
from helios_core.config import CHUNK_FRAMES, NATIVE_HEIGHT, NATIVE_WIDTH, TransformerConfig
from helios_core.transformer import HeliosTransformer

if TYPE_CHECKING:  # it needs aiohttp, which comes with ComfyUI
    from harness.client import Run

WEIGHTS = Path("diffusion_models/helios_14b.safetensors")  # in a folder of models; the others are small
VAE, LORA, FOLDER = Path("vae/wan_2.1_vae.safetensors"), Path("loras/random.safetensors"), "diffusers/Helios-Distilled"
VAE_DIM = {True: 1, False: 96}  # of a rehearsal, and of the real one
RANK, LORA_SCALE = 16, 0.02
LIMIT = 1200  # seconds of a run; a part of `make gpu` has a limit of its own
LACKING = re.compile(r"(?:ModuleNotFoundError|ImportError): (.+)\Z")  # what a log ends with
PROBED = {  # by which probe of comfyui_probe.py, and what makes the value that it hands on
    "ProbeText": "HeliosTextEncode",
    "ProbeLatent": "HeliosChunkedSampler",
    "ProbeImages": "HeliosChunkedVAEDecode",
}
SAMPLER = PROBED["ProbeLatent"]

Graph = dict[str, Any]


class Card(Peak):
    """What is taken of the card's memory, by whomever, while the context lasts; over what it was before, when made."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, int]] = []  # when, and bytes
        self.before = self.now()

    def now(self) -> int:
        free, total = torch.cuda.mem_get_info() if device().type == "cuda" else (0, 0)
        self.samples.append((time.monotonic(), total - free))
        return total - free

    def between(self, begin: float, end: float) -> float | None:
        """The most in this time, in GB; None without a card."""
        return max((used - self.before for at, used in self.samples if begin <= at <= end), default=0) / GB or None


@dataclass(frozen=True)
class Seen:
    """What a run of a graph took."""

    seconds: float
    chunks: list[float]  # seconds of each; the first with what the host does before it, such as loading the model
    text: float  # when it was encoded,
    latent: float  # sampled
    images: float  # and decoded
    allocated: int  # bytes, at most, by torch while it sampled
    files: list[Path]  # that were saved

    @property
    def chunk(self) -> float:
        return statistics.median(self.chunks[1:])

    @property
    def decoding(self) -> float:
        return self.images - self.latent

    @property
    def rate(self) -> float:
        """Frames a second, text encoder and file left out."""
        return len(self.chunks) * CHUNK_FRAMES / (self.images - self.text)

    def file(self, ending: str) -> Path:
        return next(file for file in self.files if file.suffix == ending)


def check() -> None:
    """Raise MissingError where there is no ComfyUI, or a module that any ComfyUI or the pack needs."""
    require("aiohttp", "av", "ftfy", "safetensors", "sentencepiece", "transformers")
    try:
        comfyui_path()
    except HostError as error:
        raise MissingError(f"{error} It is what this part runs in.") from error


def version() -> str | None:
    """Of the ComfyUI; None where there is none."""
    with suppress(HostError, OSError):
        return (comfyui_path() / "comfyui_version.py").read_text(encoding="utf-8").split('"')[-2]
    return None


@contextmanager
def server(base: Path, models: Path | None, *options: str, cpu: bool = False) -> Iterator[Host]:
    """A server with the pack and the probes, and without a page; MissingError where it lacks a module."""
    shutil.rmtree(base, ignore_errors=True)  # of a run that was killed
    page = base / "page"  # empty, which spares the package that has it
    page.mkdir(parents=True)
    cpu = cpu or device().type == "cpu"
    host = Host(base, models=models, cpu=cpu, options=("--front-end-root", str(page), *options))
    (host.base / "custom_nodes" / "probe.py").symlink_to(Path(__file__).with_name("comfyui_probe.py"))
    try:
        host.start()
    except HostError as error:
        if lacking := LACKING.search(host.log.read_text(errors="replace").rstrip()):
            raise MissingError(f"ComfyUI does not start: {lacking[1]}") from error
        raise
    try:
        yield host
    finally:
        host.stop()
        print(host.log.read_text(errors="replace"))  # into the part's log, which stays


def make_models(models: Path, tiny: bool) -> None:
    """Random weights of everything; what is there is left, as are the 14B's, which other parts make.

    Raises MissingError where libraries are missing, or what they need.
    """
    config = TransformerConfig(**(TINY if tiny else {}))
    if not (models / VAE).exists():  # the last of those that are made here, and whole if it is there
        try:
            make_text_encoder(models / FOLDER, config.text_dim)
            make_lora(models / LORA, config)
            make_vae(models / VAE, VAE_DIM[tiny])
        except ImportError as error:
            raise MissingError(f"ComfyUI's requirements: {first_line(error)}") from error
    if not (models / WEIGHTS).exists():
        write_weights(models / WEIGHTS, config)
        torch.cuda.empty_cache()


def make_text_encoder(folder: Path, width: int) -> None:
    """An official folder of which only the text encoder is used, Helios-Tiny's but for its width: the host's own
    CLIPLoader builds UMT5-XXL."""
    from transformers import UMT5Config, UMT5EncoderModel

    for source in ("Helios-Tiny-Distilled", "Helios-Tiny"):
        shutil.copytree(ROOT / "models" / source, folder, dirs_exist_ok=True)
    config = UMT5Config.from_pretrained(folder / "text_encoder")
    config.d_model = width
    torch.manual_seed(0)
    UMT5EncoderModel(config).to(torch.bfloat16).save_pretrained(folder / "text_encoder")


def make_lora(file: Path, config: TransformerConfig) -> None:
    """For every matrix of the blocks."""
    torch.manual_seed(0)
    made = {}
    for name, weight in HeliosTransformer(config, device="meta").blocks.named_parameters():
        if name.endswith(".weight") and weight.ndim == 2:
            layer = published_name(f"blocks.{name}").removesuffix(".weight")
            for matrix, shape in {"A": (RANK, weight.shape[1]), "B": (weight.shape[0], RANK)}.items():
                made[f"transformer.{layer}.lora_{matrix}.weight"] = LORA_SCALE * torch.randn(shape).bfloat16()
    save_whole(file, made)


def make_vae(file: Path, dim: int) -> None:
    vae = decode.host_vae(dim, dim_mult=[1, 2, 4, 4], num_res_blocks=2)
    save_whole(file, {name: weight.bfloat16() for name, weight in vae.state_dict().items()})


def graph(host: Host, tiny: bool, chunks: int) -> Graph:
    """Text to video by Distilled in 2, 2, 2 steps without an amplified first chunk, probed; latents are saved, too.

    A rehearsal is in float32, where the core alone gives the same.
    """
    size = {"dtype": "fp32"} if tiny else {"dtype": "bf16", "width": NATIVE_WIDTH, "height": NATIVE_HEIGHT}
    api = small_api(
        "helios_t2v_distilled_files",
        host.get("/object_info"),
        model_name=WEIGHTS.name,
        frames=chunks * CHUNK_FRAMES,
        amplify_first_chunk=False,
        seed=0,  # as network_gpu.make has it
        **size,
    )
    for probe, kind in PROBED.items():
        api = behind(api, find(api, kind), probe, "value")
    latents = [find(api, SAMPLER), 0]
    api["latents"] = {"class_type": "SaveLatent", "inputs": {"samples": latents, "filename_prefix": "latents"}}
    return api


def behind(api: Graph, source: str, kind: str, socket: str, **inputs: Any) -> Graph:
    """The graph with a further node between the first output of one and all that take it."""
    changed = {}
    for key, node in api.items():
        links = {name: [kind, 0] if value == [source, 0] else value for name, value in node["inputs"].items()}
        changed[key] = {**node, "inputs": links}
    return {**changed, kind: {"class_type": kind, "inputs": {socket: [source, 0], **inputs}}}


def having(api: Graph, **inputs: Any) -> Graph:
    """The graph with these inputs set wherever a node has them."""
    return {
        key: {**node, "inputs": {name: inputs.get(name, value) for name, value in node["inputs"].items()}}
        for key, node in api.items()
    }


def execute(host: Host, api: Graph) -> tuple[Run, list[Path]]:
    """Run a graph to its end; what the server told, and the files that were saved."""
    from harness.client import run_workflow

    run = run_workflow(host.url, api, timeout=LIMIT)
    return run, [host.output / file["subfolder"] / file["filename"] for file in run.files()]


def watch(host: Host, api: Graph) -> Seen:
    """Run a graph that is probed."""
    run, files = execute(host, api)
    sampler = find(api, SAMPLER)
    begun = next(e.seconds for e in run.events if e.kind == "executing" and e.data["node"] == sampler)
    steps = {progress.value: progress.seconds for progress in run.progress if progress.node == sampler}
    chunks = api[find(api, "HeliosHistoryInjection")]["inputs"]["frames"] // CHUNK_FRAMES
    ends = [begun, *(steps[max(steps) * chunk // chunks] for chunk in range(1, chunks + 1))]
    text, latent, images = (run.outputs[probe]["seen"][0] for probe in PROBED)
    return Seen(
        run.seconds,
        [end - start for start, end in pairwise(ends)],
        text["time"],
        latent["time"],
        images["time"],
        latent["allocated"],
        files,
    )
