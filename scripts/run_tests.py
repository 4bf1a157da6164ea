"""Run the test suites, each in a process of its own, and close with one line for all: run_tests.py [SUITE...]

Apart, because `core` must pass where no ComfyUI can be imported, and ComfyUI's settings are global to a process.
Without names: all of SUITES that there is a folder of; without `page`, where BROWSER=0.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REPORTS = ROOT / "build" / "reports"

# AT_ONCE of them run side by side, begun in this order, by which both cores are done at about the same time. A browser
# and its server want both, but wait a good deal: beside them runs what only computes.
SUITES = ("page", "meaning", "core", "host", "server", "faults")
# A suite is a folder of tests/, but for these: what a marker selects of one.
SELECTED = {"server": ("server", "not browser"), "page": ("server", "browser")}
AT_ONCE = 2
GRACE = 15.0  # seconds for a suite to put its servers away

OUTCOMES = {"failure": "failed", "error": "errors", "skipped": "skipped"}


def plan(names: Sequence[str]) -> list[str]:
    """The suites to run, in order: these, or all that there is a folder of."""
    left_out = {"page"} if os.environ.get("BROWSER") == "0" else set()
    wanted = names or [suite for suite in SUITES if folder(suite).is_dir() and suite not in left_out]
    return sorted(dict.fromkeys(wanted), key=lambda suite: (*SUITES, suite).index(suite))


def folder(suite: str) -> Path:
    return ROOT / "tests" / SELECTED.get(suite, (suite,))[0]


def start(suite: str) -> subprocess.Popen[bytes]:
    report(suite).unlink(missing_ok=True)
    command = [str(Path(sys.executable).with_name("pytest")), "-c", "tests/pytest.ini", "--rootdir", "tests"]
    command += [f"--junitxml={report(suite)}", f"--color={'yes' if sys.stdout.isatty() else 'no'}"]
    command += ["-m", SELECTED[suite][1]] if suite in SELECTED else []
    # One thread: on networks this small, threads mostly wait for each other.
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with output(suite).open("wb") as log:
        # In a session of its own: Ctrl-C reaches this process alone, which then ends all of them.
        return subprocess.Popen(
            [*command, folder(suite).relative_to(ROOT)],
            cwd=ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def run(suites: Sequence[str]) -> dict[str, int]:
    """pytest's exit status of each. What a suite says is shown as it comes, once those before it have ended."""
    processes: dict[str, subprocess.Popen[bytes]] = {}

    def fill() -> None:
        running = sum(process.poll() is None for process in processes.values())
        waiting = [suite for suite in suites if suite not in processes]
        processes.update({suite: start(suite) for suite in waiting[: AT_ONCE - running]})

    try:
        for suite in suites:
            fill()
            print(f"\n--- {suite} ---", flush=True)
            with output(suite).open("rb") as log:
                while True:
                    fill()
                    ended = processes[suite].poll() is not None
                    sys.stdout.buffer.write(log.read())
                    sys.stdout.flush()
                    if ended:
                        break
                    time.sleep(0.2)
    finally:
        stop([process for process in processes.values() if process.poll() is None])
    return {suite: process.returncode for suite, process in processes.items()}


def stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End suites that still run: as Ctrl-C does, which lets them clean up, and by force if that takes too long."""
    for process in processes:
        process.send_signal(signal.SIGINT)
    end = time.monotonic() + GRACE
    try:
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def count(suite: str) -> Counter[str]:
    """The number of tests by outcome."""
    counts: Counter[str] = Counter()
    if report(suite).is_file():
        for case in ElementTree.parse(report(suite)).iter("testcase"):
            counts[case[0].tag if len(case) and case[0].tag in OUTCOMES else "passed"] += 1
    return counts


def report(suite: str) -> Path:
    return REPORTS / f"{suite}.xml"


def output(suite: str) -> Path:
    return REPORTS / f"{suite}.log"


def main(names: Sequence[str]) -> int:
    REPORTS.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # not without ending the suites
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job, and what it starts, would ignore it
    begin = time.monotonic()
    try:
        statuses = run(plan(names))
    except KeyboardInterrupt:
        print("\n===== interrupted =====")
        return 128 + signal.SIGINT
    total = sum((count(suite) for suite in statuses), Counter[str]())
    failed = [suite for suite, status in statuses.items() if status]
    words = [f"{total[tag]} {word}" for tag, word in {"passed": "passed", **OUTCOMES}.items() if total[tag]]
    closing = f"{', '.join(words) or 'no tests ran'} in {time.monotonic() - begin:.1f}s"
    print(f"\n===== {closing} ({', '.join(statuses)}{'; failed: ' + ', '.join(failed) if failed else ''}) =====")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
