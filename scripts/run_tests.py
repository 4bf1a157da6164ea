"""Run the test suites, each in a process of its own, and close with one line for all: run_tests.py SUITE...

Apart, because `core` must pass where no ComfyUI can be imported, and ComfyUI's settings are global to a process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REPORTS = ROOT / "build" / "reports"


def run(suite: str) -> tuple[int, Counter[str]]:
    """Returns pytest's exit status and the number of tests by outcome."""
    report = REPORTS / f"{suite}.xml"
    report.unlink(missing_ok=True)
    command = [str(Path(sys.executable).with_name("pytest")), "-c", "tests/pytest.ini", "--rootdir", "tests"]
    # One thread: on networks this small, threads mostly wait for each other.
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    status = subprocess.run([*command, f"--junitxml={report}", f"tests/{suite}"], cwd=ROOT, env=env).returncode
    counts: Counter[str] = Counter()
    if report.is_file():
        for case in ElementTree.parse(report).iter("testcase"):
            counts[case[0].tag if len(case) and case[0].tag in OUTCOMES else "passed"] += 1
    return status, counts


OUTCOMES = {"failure": "failed", "error": "errors", "skipped": "skipped"}


def main(suites: list[str]) -> int:
    REPORTS.mkdir(parents=True, exist_ok=True)
    start, total, failed = time.monotonic(), Counter[str](), []
    for suite in suites:
        print(f"\n--- tests/{suite} ---", flush=True)
        status, counts = run(suite)
        total += counts
        if status:
            failed.append(suite)
    words = [f"{total[tag]} {word}" for tag, word in {"passed": "passed", **OUTCOMES}.items() if total[tag]]
    closing = f"{', '.join(words) or 'no tests ran'} in {time.monotonic() - start:.1f}s"
    print(f"\n===== {closing} ({', '.join(suites)}{'; failed: ' + ', '.join(failed) if failed else ''}) =====")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
