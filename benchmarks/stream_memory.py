"""Host memory of Helios Stream Video in a real server: a video of 44 chunks beside one of 4.

Each video has a server of its own, on tiny random weights; its peak is the largest sampled RssAnon of the process minus
the value when it had started, all nodes imported. malloc gives back what is freed, so that memory counts that is in
use. A chunk's peak depends on how decoding, encoding and denoising meet: the longer video has more chances of a high
one, so the ratio errs upwards. Every file is decoded to its end. `python benchmarks/stream_memory.py`, or `rows()`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import av
import paths  # noqa: F401
from measure import Peak, Row, table

from harness.client import run_workflow
from harness.host import Host
from harness.models import make_tiny_models
from harness.small import small_api
from helios_core.config import CHUNK_FRAMES

WIDTH, HEIGHT = 448, 256
SHORT, LONG = 4, 44  # chunks; 44 are a minute
STEPS = {"steps_stage_1": 1, "steps_stage_2": 1, "steps_stage_3": 1, "amplify_first_chunk": False}
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144", "MALLOC_ARENA_MAX": "2"}  # glibc
MB = 1e6


def peak(models: Path, workflow: str, chunks: int) -> int:
    """Bytes that making one video takes in a new server, weights included."""
    with tempfile.TemporaryDirectory() as base, Host(Path(base), models=models, env=GIVE_BACK) as host:
        assert host.process is not None
        info = host.get("/object_info")
        api = small_api(workflow, info, width=WIDTH, height=HEIGHT, frames=CHUNK_FRAMES * chunks, **STEPS)
        with Peak(host.process.pid) as memory:
            run = run_workflow(host.url, api, timeout=1800)
        if len(run.files()) != 1:
            raise RuntimeError(f"{workflow} wrote {run.files()} instead of one video.")
        [file] = run.files()
        with av.open(str(host.output / file["subfolder"] / file["filename"])) as video:
            frames = sum(1 for _ in video.decode(video=0))
    if frames != CHUNK_FRAMES * chunks:
        raise RuntimeError(f"{workflow} was to make {CHUNK_FRAMES * chunks} frames, its file has {frames}.")
    print(f"{workflow:22} {chunks:3} chunks {memory.bytes / MB:8.0f} MB", flush=True)
    return memory.bytes


def rows() -> list[Row]:
    """How much more a minute takes than 4 chunks. Peer: the same videos by sampler, decoder and Create Video."""
    with tempfile.TemporaryDirectory() as folder:
        models = make_tiny_models(Path(folder))
        stream, images = (
            [peak(models, workflow, chunks) for chunks in (LONG, SHORT)]
            for workflow in ("helios_stream", "helios_t2v_distilled")
        )
    note = "peer: sampler, decoder and Create Video"
    return [
        Row.compare(f"stream_{LONG}_over_{SHORT}", stream[0] / stream[1], images[0] / images[1], "x", note),
        Row.compare(f"stream_{LONG}_chunks", stream[0] / MB, images[0] / MB, "MB", note),
    ]


if __name__ == "__main__":
    print(table(rows()))
