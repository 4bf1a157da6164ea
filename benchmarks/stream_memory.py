"""Host memory of Helios Stream Video in a real server: a video of 44 chunks beside videos of 4.

Each length has a server of its own, on tiny random weights; the peak is the largest sampled RssAnon of its process
minus the value when it had started, all nodes imported. How decoding, encoding and denoising happen to meet makes each
chunk's peak another one, so both lengths get as many chunks: one video of 44, eleven of 4; a second row has a single
video of 4. malloc gives back what is freed, so that memory counts that is in use. `python benchmarks/stream_memory.py`,
or `rows()`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests")]

from measure import Peak, Row, table  # noqa: E402

from harness.client import run_workflow  # noqa: E402
from harness.host import Host  # noqa: E402
from harness.models import make_tiny_models  # noqa: E402
from harness.small import small_api  # noqa: E402

WIDTH, HEIGHT = 320, 192
SHORT, LONG = 4, 44  # chunks; 44 are a minute
STEPS = {"steps_stage_1": 1, "steps_stage_2": 1, "steps_stage_3": 1, "amplify_first_chunk": False}
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144", "MALLOC_ARENA_MAX": "2"}  # glibc
MB = 1e6


def peak(models: Path, workflow: str, chunks: int, videos: int = 1) -> int:
    """Bytes that videos of so many chunks take, one after the other in a new server, weights included."""
    with tempfile.TemporaryDirectory() as base, Host(Path(base), models=models, env=GIVE_BACK) as host:
        assert host.process is not None
        info = host.get("/object_info")
        size = {"width": WIDTH, "height": HEIGHT, "frames": 33 * chunks}
        with Peak(host.process.pid) as memory:
            for seed in range(videos):
                run = run_workflow(host.url, small_api(workflow, info, **size, **STEPS, seed=seed), timeout=1800)
                if len(run.files()) != 1:
                    raise RuntimeError(f"{workflow} wrote {run.files()} instead of one video.")
    print(f"{workflow:22} {videos:2} x {chunks:2} chunks {memory.bytes / MB:8.0f} MB", flush=True)
    return memory.bytes


def rows() -> list[Row]:
    """How much more a minute takes than 4 chunks. Peer: the same videos by sampler, decoder and Create Video."""
    with tempfile.TemporaryDirectory() as folder:
        models = make_tiny_models(Path(folder))
        stream, nodes = "helios_stream", "helios_t2v_distilled"
        long, short = peak(models, stream, LONG), peak(models, stream, SHORT, videos=LONG // SHORT)
        single = peak(models, stream, SHORT)
        peer = peak(models, nodes, LONG) / peak(models, nodes, SHORT, videos=LONG // SHORT)
    return [
        Row.compare(
            f"stream_{LONG}_over_{SHORT}",
            long / short,
            peer,
            "x",
            f"{LONG // SHORT} videos of {SHORT}; peer: sampler, decoder and Create Video",
        ),
        Row(
            f"stream_{LONG}_over_single_{SHORT}", long / single, None, "x", note="fewer chunks, fewer chances of a peak"
        ),
    ]


if __name__ == "__main__":
    print(table(rows()))
