"""Numbers that must come out the same on every machine, recorded in data/numbers.safetensors with all that goes in.

`PYTHONPATH=.:tests:scripts python tests/support/recorded.py` compares and prints the differences as JSON; with
`--record` it makes the file anew, for a change that is meant to move numbers.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from harness.tiny import make_loud
from helios_core.checkpoint import published_name
from helios_core.config import CHUNK_LATENTS, LATENT_CHANNELS, SPATIAL_SCALE, TransformerConfig
from helios_core.generate import Chunk, PredictFlow, Run, generate
from helios_core.history import History, HistoryLayout
from helios_core.pyramid import block_factor
from helios_core.rope import rope_table
from helios_core.schedule import BASE, DISTILLED, GAMMA_MAX, MID, stages
from helios_core.transformer import LONG_POOL, MID_POOL, HeliosTransformer
from helios_core.video import EncodedPast, VideoStart

FILE = Path(__file__).parents[1] / "data" / "numbers.safetensors"
COMMAND = "PYTHONPATH=.:tests:scripts python tests/support/recorded.py --record"
SEED = 3
# How far each kind of number may be off: of its largest value, float64 of each value.
LIMITS = {
    "factor": 0.0,  # in closed form, rounded once
    "whole_timesteps": 0.0,  # what the network of a pyramid is asked at
    # A dozen operations that IEEE rounds correctly, and one exp, which a libm may round to a neighbour.
    "schedule": 1e-14,
    "rope": 2e-5,  # cosines and sines in float32 of angles up to 79
    "noise": 2e-6,  # Box-Muller in float32
    "asked": 1e-14,
    "run": 2e-5,  # as against diffusers
}
# Small enough to be stored, but for the sinusoid of the timestep: its angles, to 999, are what float32 rounds worst.
NETWORK = TransformerConfig(
    num_attention_heads=2,
    attention_head_dim=12,
    rope_dim=(4, 4, 4),
    text_dim=32,
    freq_dim=256,
    ffn_dim=48,
    num_layers=2,
)
SIZES = ((384, 640), (128, 64))  # pixels, height first
SCHEDULES = {
    "base": BASE,
    "mid": MID,
    "mid_below": replace(MID, shift_level="stage_below"),
    "distilled": replace(DISTILLED, amplify_first_chunk=False),
    "distilled_amplified": DISTILLED,
    "unshifted": replace(DISTILLED, time_shift=None),
}
RUNS = {"base": replace(BASE, steps=(4,)), "mid": replace(MID, steps=(3, 2, 2)), "distilled": DISTILLED}
LATENTS = 8  # height and width of the runs, 64 x 64 pixels


def random_inputs() -> dict[str, Tensor]:
    """All that a run is given beside its seed, in float16: halves of the file's size, and exact in float32."""
    rng = torch.Generator().manual_seed(SEED)
    network = make_loud(HeliosTransformer(NETWORK), SEED)
    inputs = {f"network.{published_name(name)}": weight for name, weight in network.state_dict().items()}
    for name, frames in (("image", 1), ("still", 1), ("video", CHUNK_LATENTS)):
        inputs[name] = torch.randn(1, LATENT_CHANNELS, frames, LATENTS, LATENTS, generator=rng)
    for name in ("positive", "negative"):
        inputs[name] = torch.randn(1, 12, NETWORK.text_dim, generator=rng)
    return {f"input.{name}": tensor.half().contiguous() for name, tensor in inputs.items()}


def compute(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every recorded number anew."""
    values = {name.removeprefix("input."): tensor.float() for name, tensor in inputs.items()}
    rng = torch.Generator().manual_seed(SEED)
    numbers = {"factor": block_factor(GAMMA_MAX), "noise": torch.randn(4096, generator=rng)}
    for size in SIZES:
        numbers |= schedule_numbers(*size) | rope_numbers(*size)
    for variant in RUNS:
        numbers |= run_numbers(variant, values)
    return numbers


def schedule_numbers(height: int, width: int) -> dict[str, Tensor]:
    numbers = {}
    for variant, schedule in SCHEDULES.items():
        plan = stages(schedule, height // SPATIAL_SCALE, width // SPATIAL_SCALE, first_chunk=True)
        for index, stage in enumerate(plan):
            name = f"{variant}.{width}x{height}.{index}"
            numbers[f"schedule.timesteps.{name}"] = stage.timesteps
            numbers[f"schedule.sigmas.{name}"] = stage.sigmas
            if schedule.is_pyramid:
                numbers[f"whole_timesteps.{name}"] = stage.timesteps.trunc()
            if stage.entry:
                numbers[f"schedule.renoise.{name}"] = torch.tensor(stage.entry, dtype=torch.float64)
    return numbers


def rope_numbers(height: int, width: int) -> dict[str, Tensor]:
    """Sixteen tokens of each table, from the first to the last: of the 14B model, alike in all variants."""
    config, indices = TransformerConfig(), HistoryLayout().indices
    rows, columns = height // SPATIAL_SCALE // 2, width // SPATIAL_SCALE // 2
    parts = {
        "long": (indices.long, 1, LONG_POOL),
        "mid": (indices.mid, 1, MID_POOL),
        "short": (indices.short, 1, 1),
        "noisy_2": (indices.noisy, 1, 1),
        "noisy_1": (indices.noisy, 2, 1),
        "noisy_0": (indices.noisy, 4, 1),
    }
    numbers = {}
    for name, (frames, scale, pool) in parts.items():
        table = rope_table(frames, rows // scale, columns // scale, config.rope_dim, config.rope_theta, pool)
        tokens = torch.arange(16) * (table.shape[1] - 1) // 15
        numbers[f"rope.{name}.{width}x{height}"] = table[:, tokens].contiguous()
    return numbers


@torch.no_grad()
def run_numbers(variant: str, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The first chunk from text, the second that goes on from it, and one each from an image and from a video."""
    schedule, network, asked = RUNS[variant], HeliosTransformer(NETWORK), list[float]()
    network.load_state_dict({name: values[f"network.{published_name(name)}"] for name in network.state_dict()})

    def bind(index: int, history: History) -> PredictFlow:
        def predict_flow(latents: Tensor, timestep: float, sigma: float) -> Tensor:
            asked.append(timestep)
            batch = torch.full((1,), timestep)
            cond, uncond = (network(latents, batch, values[name], history) for name in ("positive", "negative"))
            return schedule.guide(cond, uncond) if schedule.guided else cond

        return predict_flow

    def chunk(seed: VideoStart, rng: torch.Generator) -> Chunk:
        memory = seed.memory(1, LATENTS, LATENTS, rng)
        return next(generate(bind, Run(schedule, memory, 1, rng, first_index=seed.first_index)))

    rng = torch.Generator().manual_seed(SEED)
    text = chunk(VideoStart(), rng)
    chunks = {"text": text, "continued": chunk(VideoStart(text.memory, first_index=1), rng)}
    image, still, video = (values[name] for name in ("image", "still", "video"))
    for kind, source in (("image", EncodedPast(image, still)), ("video", EncodedPast(image, video))):
        chunks[kind] = chunk(VideoStart(source), torch.Generator().manual_seed(SEED))
    numbers = {f"run.{variant}.{kind}": made.latents.contiguous() for kind, made in chunks.items()}
    return numbers | {f"asked.{variant}": torch.tensor(asked, dtype=torch.float64)}


def difference(recorded: Tensor, found: Tensor) -> float:
    """The largest, as LIMITS counts it."""
    if recorded.shape != found.shape or recorded.dtype != found.dtype:
        return math.inf
    distance = (found - recorded).abs()
    if recorded.dtype == torch.float64:
        return (distance / recorded.abs().where(recorded != 0, 1.0)).max().item()
    return (distance.max() / recorded.abs().max()).item()


def load() -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, str]]:
    """(inputs, numbers, metadata) of the file."""
    with safe_open(FILE, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        metadata = file.metadata()
    inputs = {name: tensor for name, tensor in tensors.items() if name.startswith("input.")}
    return inputs, {name: tensor for name, tensor in tensors.items() if name not in inputs}, metadata


def compare() -> dict[str, float]:
    """Each recorded number's difference to what comes out here."""
    inputs, recorded, _ = load()
    found = compute(inputs)
    if found.keys() != recorded.keys():
        raise SystemExit(f"The file does not hold what is compared: make it with {COMMAND}")
    return {name: difference(tensor, found[name]) for name, tensor in recorded.items()}


def misfits(differences: dict[str, float]) -> dict[str, float]:
    """Those that are further off than their kind may be."""
    return {name: value for name, value in differences.items() if not value <= LIMITS[name.split(".")[0]]}


def largest(differences: dict[str, float]) -> dict[str, float]:
    """The largest difference of each kind."""
    return {kind: max(v for name, v in differences.items() if name.split(".")[0] == kind) for kind in LIMITS}


def processor() -> str:
    """As the system names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    fields = dict(reversed([[x.strip() for x in line.split(":", 1)] for line in lines if ":" in line]))
    if "model name" not in fields:
        return platform.processor() or platform.machine()
    return f"{fields['model name']}, family {fields['cpu family']}, model {fields['model']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true", help="make the file anew")
    if not parser.parse_args().record:
        print(json.dumps(compare()))
        return
    inputs = random_inputs()
    FILE.parent.mkdir(exist_ok=True)
    metadata = {
        "processor": processor(),
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "command": COMMAND,
    }
    save_file(inputs | compute(inputs), FILE, metadata)


if __name__ == "__main__":
    main()
