"""Host memory of Helios Stream Video in a real server: videos of 44 chunks beside videos of 4.

Each length has a server of its own, on tiny random weights; the peak is the largest sampled RssAnon of its process
minus the value when it had started, all nodes imported. How decoding, encoding and denoising happen to meet makes each
chunk's peak another one, so both lengths get as many chunks: one video of 44, eleven of 4. malloc gives back what is
freed, so that memory counts that is in use. `python benchmarks/stream_memory.py`, or `row()`.
"""

from __future__ import annotations

import sys
import tempfile
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests")]

from harness.client import run_workflow  # noqa: E402
from harness.host import Host  # noqa: E402
from harness.models import make_tiny_models  # noqa: E402
from harness.small import small_api  # noqa: E402

WIDTH, HEIGHT = 320, 192
SHORT, LONG = 4, 44  # chunks; 44 are a minute
STEPS = {"steps_stage_1": 1, "steps_stage_2": 1, "steps_stage_3": 1, "amplify_first_chunk": False}
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144", "MALLOC_ARENA_MAX": "2"}  # glibc
MB = 1e6


class PeakOf:
    """The largest RssAnon of another process while the context lasts, over its value at the start; sampled."""

    def __init__(self, process: int):
        self.status = Path(f"/proc/{process}/status")

    def now(self) -> int:
        line = next(line for line in self.status.read_text().splitlines() if line.startswith("RssAnon:"))
        return int(line.split()[1]) * 1024

    def __enter__(self) -> PeakOf:
        self.start = self.peak = self.now()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._sample)
        self.thread.start()
        return self

    def _sample(self) -> None:
        while not self.done.wait(0.002):
            self.peak = max(self.peak, self.now())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.done.set()
        self.thread.join()

    @property
    def bytes(self) -> int:
        return self.peak - self.start


def peak(models: Path, workflow: str, chunks: int) -> int:
    """Bytes that LONG chunks in videos of so many take in a new server, text encoder and weights included."""
    with tempfile.TemporaryDirectory() as base, Host(Path(base), models=models, env=GIVE_BACK) as host:
        size = {"width": WIDTH, "height": HEIGHT, "frames": 33 * chunks}
        info = host.get("/object_info")
        assert host.process is not None
        with PeakOf(host.process.pid) as memory:
            for seed in range(LONG // chunks):
                api = small_api(workflow, info, **size, **STEPS, resume=False, seed=seed)
                run = run_workflow(host.url, api, timeout=1800)
                if len(run.files()) != 1:
                    raise RuntimeError(f"{workflow} wrote {run.files()} instead of one video.")
        return memory.bytes


def row() -> dict[str, Any]:
    """`stream_44_over_4`. Peer: the same videos by sampler, decoder and Create Video."""
    with tempfile.TemporaryDirectory() as folder:
        models = make_tiny_models(Path(folder))
        peaks: dict[tuple[str, int], int] = {}
        for workflow in ("helios_stream", "helios_t2v_distilled"):
            for chunks in (SHORT, LONG):
                peaks[workflow, chunks] = peak(models, workflow, chunks)
                print(f"{workflow:22} {chunks:3} chunks {peaks[workflow, chunks] / MB:8.0f} MB", flush=True)
    ours, peer = (peaks[name, LONG] / peaks[name, SHORT] for name in ("helios_stream", "helios_t2v_distilled"))
    return {
        "name": f"stream_{LONG}_over_{SHORT}",
        "ours": round(ours, 3),
        "peer": round(peer, 3),
        "ratio": round(peer / ours, 3),
        "unit": "x",
        "peer_is": "sampler, decoder and Create Video",
    }


if __name__ == "__main__":
    print(row())
