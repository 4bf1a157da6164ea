"""The 14B model on the GPU of this machine, with random weights: `make bench-gpu`.

Runs from a plain copy of the repository with PyTorch (and the NumPy it usually comes with). Rows of diffusers, and
frames per second with VAE, are measured where diffusers is installed; what is missing is listed. Everything is exact
bf16 but rows that say otherwise. Rows go to build/bench-gpu.json. --tiny runs it all on any machine, in a minute, to
see that it runs: its numbers say nothing.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import decode
import torch
import torch.nn.functional as F
from measure import Row, in_turns, peak_extra_bytes, seconds, table, write
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from helios_core.config import CHUNK_FRAMES, CHUNK_LATENTS, TransformerConfig  # noqa: E402
from helios_core.generate import generate  # noqa: E402
from helios_core.history import History, Memory  # noqa: E402
from helios_core.schedule import DISTILLED  # noqa: E402
from helios_core.transformer import HeliosTransformer  # noqa: E402

REAL, REAL_LATENTS, TEXT_LENGTH = TransformerConfig(), (48, 80), 512
TINY = TransformerConfig(
    num_attention_heads=2, attention_head_dim=32, rope_dim=(12, 10, 10), ffn_dim=128, text_dim=64, num_layers=2
)
TINY_LATENTS = (8, 8)
TINY_VAE = {"base_dim": 2, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
TURNS = 5
TERA = 1e12


class Bench:
    """One network on one device, and the inputs of all rows."""

    def __init__(self, tiny: bool):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.config, self.latents = (TINY, TINY_LATENTS) if tiny else (REAL, REAL_LATENTS)
        self.matrix = 512 if tiny else 8192
        torch.manual_seed(0)
        self.network = HeliosTransformer(self.config, dtype=torch.bfloat16, device=self.device).eval()
        self.network.requires_grad_(False)
        self.text = self.random(1, TEXT_LENGTH, self.config.text_dim)
        self.open: list[str] = []

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=torch.bfloat16)

    def history(self) -> History:
        return low(Memory(self.random(1, 16, 19, *self.latents), self.random(1, 16, 1, *self.latents)).history())

    def median(self, function: Callable[[], Any]) -> float:
        function()
        return statistics.median(seconds(function) for _ in range(TURNS))


def low(history: History) -> History:
    return replace(history, **{name: getattr(history, name).bfloat16() for name in ("long", "mid", "short")})


def matrix_peak(bench: Bench) -> float:
    """FLOP/s of a large bf16 matrix product: what the percentages are of."""
    a, b = bench.random(bench.matrix, bench.matrix), bench.random(bench.matrix, bench.matrix)
    return 2 * bench.matrix**3 / bench.median(lambda: a @ b)


def attention(bench: Bench) -> Iterator[Row]:
    """Self-attention of the largest stage by every backend that is here: bf16 (B, heads, S, head_dim)."""
    height, width = (size // 2 for size in bench.latents)
    history = height * width * 2 + (height // 2) * (width // 2) + 4 * -(-height // 4) * -(-width // 4)
    length, heads = 9 * height * width + history, bench.config.num_attention_heads
    q, k, v = (bench.random(1, length, heads, bench.config.attention_head_dim) for _ in range(3))
    work = 4 * length**2 * heads * bench.config.attention_head_dim

    def torchs(backend: SDPBackend) -> Callable[[], Any]:
        def run() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))

        return run

    runs: dict[str, Callable[[], Any]] = {"default": lambda: F.scaled_dot_product_attention(*heads_first(q, k, v))}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        runs[backend.name.lower()] = torchs(backend)
    for module, function, label in (
        ("flash_attn", "flash_attn_func", "flash_attn_2"),
        ("flash_attn_interface", "flash_attn_func", "flash_attn_3"),
        ("sageattention", "sageattn", "sage_not_exact"),
    ):
        if importlib.util.find_spec(module) is None:
            bench.open.append(f"attention by {label}: {module} is not installed")
            continue
        call = getattr(importlib.import_module(module), function)
        runs[label] = (
            (lambda call=call: call(q, k, v, tensor_layout="NHD"))
            if "sage" in module
            else (lambda call=call: call(q, k, v))
        )
    for label, run in runs.items():
        try:
            took = bench.median(run)
        except RuntimeError as error:
            bench.open.append(f"attention by {label}: {str(error).splitlines()[0]}")
            continue
        yield Row(f"attention_{label}", took, None, "s", note=f"{work / took / TERA:.1f} TFLOP/s")


def heads_first(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


def forwards(bench: Bench, suffix: str, peer: Any, peak: float) -> Iterator[Row]:
    """One forward of each stage, without caches."""
    history = bench.history()
    for stage in range(3):
        size = [latents // 2 ** (2 - stage) for latents in bench.latents]
        args = (bench.random(1, 16, 9, *size), torch.tensor([500.0], device=bench.device), bench.text, history)

        def mine(args: tuple = args) -> Tensor:
            return bench.network(*args)

        with FlopCounterMode(display=False) as counter:
            mine()
        work = counter.get_total_flops()
        if peer is None:
            took, theirs = bench.median(mine), None
        else:
            theirs_run = asking(peer, args)
            theirs_run()
            took, theirs = in_turns(mine, theirs_run, TURNS)
        rate = work / took
        note = f"{work / TERA:.1f} TFLOP, {rate / TERA:.0f} TFLOP/s, {100 * rate / peak:.0f} % of the matrix peak"
        name = f"forward_stage{stage}{suffix}"
        yield Row(name, took, theirs, "s", theirs / took if theirs else None, note)
    yield Row(f"forward_extra_memory{suffix}", peak_extra_bytes(mine) / 1e6, None, "MB")


def asking(peer: Any, args: tuple) -> Callable[[], Any]:
    latents, timestep, text, history = args
    index = {
        name: torch.tensor([getattr(history.indices, name)], device=latents.device)
        for name in ("noisy", "short", "mid", "long")
    }
    past = (history.short, history.mid, history.long)
    indices = (index["noisy"], index["short"], index["mid"], index["long"])
    return lambda: peer(latents, timestep, text, *indices, *past, return_dict=False)


def chunks(bench: Bench, suffix: str, to_frames: Callable[[Tensor], Any] | None) -> Iterator[Row]:
    """Whole chunks with the caches of a run, then with decoding, one after the other."""
    for steps in ((1, 1, 1), (2, 2, 2)):
        schedule = replace(DISTILLED, steps=steps, amplify_first_chunk=False)
        name = "".join(map(str, steps))

        def run(schedule: Any = schedule, count: int = 1) -> Iterator[Tensor]:
            text = bench.network.prepare_text(bench.text)

            def bind(index: int, history: History) -> Callable[[Tensor, float, float], Tensor]:
                past = bench.network.prepare_history(low(history))

                def predict(latents: Tensor, timestep: float, sigma: float) -> Tensor:
                    time = torch.full((1,), timestep, device=bench.device)
                    return bench.network(latents.bfloat16(), time, text, past).float()

                return predict

            memory = Memory.empty(1, *bench.latents).to(bench.device)
            for chunk in generate(bind, schedule, memory, count, torch.Generator().manual_seed(0)):
                yield chunk.latents

        took = bench.median(lambda run=run: next(run()))
        yield Row(f"chunk_{name}{suffix}", took, None, "s", note=f"{CHUNK_FRAMES / took:.2f} FPS without VAE")
        if to_frames is not None:

            def decoded(run: Any = run, to_frames: Any = to_frames) -> None:
                for latents in run(count=3):
                    to_frames(latents)

            first = bench.median(lambda run=run: to_frames(next(run())))
            rate = 3 * CHUNK_FRAMES / bench.median(decoded)
            yield Row(f"first_chunk_{name}{suffix}", first, None, "s", note="latency, VAE included")
            yield Row(f"fps_{name}{suffix}", rate, None, "FPS", note="end to end with VAE, text encoder apart")


def decoding(bench: Bench, vae: Any) -> Iterator[Row]:
    """Ways to decode; float32 is exactly that, without the TensorFloat-32 that torch allows in convolutions."""
    chunk = bench.random(1, 16, CHUNK_LATENTS, *bench.latents).float()
    compare = partial(in_turns, turns=TURNS)
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield from decode.rows(vae, decode.by_diffusers, chunk, compare)
    except torch.OutOfMemoryError as error:
        bench.open.append(f"further ways to decode: {str(error).splitlines()[0]}")


def diffusers_network(bench: Bench) -> Any:
    """diffusers' transformer on the very same weights: no second copy."""
    from diffusers import HeliosTransformer3DModel

    with torch.device("meta"):
        peer = HeliosTransformer3DModel(**bench.config.to_dict())
    peer.load_state_dict(bench.network.state_dict(), assign=True)
    peer.rope = type(peer.rope)(rope_dim=bench.config.rope_dim, theta=bench.config.rope_theta).to(bench.device)
    return peer.eval()


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a toy network, also without a GPU")
    parser.add_argument("--no-compile", action="store_true", help="eager rows only")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench-gpu.json")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        parser.error("there is no GPU here that PyTorch can use. --tiny runs a toy network on the CPU.")

    bench = Bench(options.tiny)
    peer = vae = to_frames = None
    if importlib.util.find_spec("diffusers") is None:
        bench.open.append("rows of diffusers, and all with VAE: diffusers is not installed")
    else:
        peer = diffusers_network(bench)
        vae = decode.random_vae(**TINY_VAE if options.tiny else {}).to(bench.device)
        low_vae = copy.deepcopy(vae).bfloat16()

        def to_frames(latents: Tensor) -> Tensor:
            return decode.by_diffusers(low_vae, latents.bfloat16())

    peak = matrix_peak(bench)
    rows = [Row("matrix_peak", peak / TERA, None, "TFLOP/s", note=f"bf16, {bench.matrix} cubed")]
    rows += [*attention(bench), *forwards(bench, "", peer, peak), *chunks(bench, "", to_frames)]
    if options.no_compile:
        bench.open.append("compiled rows: left out by --no-compile")
    elif bench.device.type == "cuda" and importlib.util.find_spec("triton") is None:
        bench.open.append("compiled rows: Triton is not installed")
    else:
        torch._dynamo.config.recompile_limit = 64
        for network in (bench.network, peer):
            for block in network.blocks if network is not None else ():
                block.compile(dynamic=False)
        rows += [*forwards(bench, "_compiled", peer, peak), *chunks(bench, "_compiled", to_frames)]
    if vae is not None:
        rows += decoding(bench, vae)
    print(table(rows))
    for missing in bench.open:
        print(f"open: {missing}")
    size = "toy network: the numbers say nothing" if options.tiny else "14B, bf16"
    write(options.out, rows, network=size, latents=bench.latents, text_length=TEXT_LENGTH, open=bench.open)
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
