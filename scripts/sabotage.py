"""Break one thing at a time, and see which tests of tests/meaning notice: `make sabotage`.

Without names: all of tests/meaning/breaks.py. The table goes to build/sabotage.md.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

from harness.pack import load_comfyui, load_pack

ROOT = Path(__file__).resolve().parents[1]
REPORTS = ROOT / "build" / "reports" / "sabotage"
TABLE = ROOT / "build" / "sabotage.md"
# Of the quickest variant, and of what is more than a prompt.
TESTS = ("tests/meaning/test_past.py", "tests/meaning/test_long.py")


def breaks() -> dict[str, str]:
    """What there is to break, and how."""
    sys.path.append(str(ROOT / "tests"))
    load_pack()
    with tempfile.TemporaryDirectory(prefix="helios-sabotage-") as folder:
        load_comfyui(folder)
        from meaning.breaks import BREAKS
    return {name: (function.__doc__ or "").rstrip(".") for name, function in BREAKS.items()}


def noticed(name: str = "") -> list[str]:
    """Names of the tests that fail with this broken, or with nothing."""
    report = REPORTS / f"{name or 'nothing'}.xml"
    command = [str(Path(sys.executable).with_name("pytest")), "-c", "tests/pytest.ini", "--rootdir", "tests"]
    command += [f"--junitxml={report}", *TESTS]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HELIOS_BREAK": name}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode not in (0, 1):  # neither passed nor failed
        raise SystemExit(done.stdout + done.stderr)
    cases = ElementTree.parse(report).iter("testcase")
    return [case.get("name", "") for case in cases if len(case) and case[0].tag in ("failure", "error")]


def main(names: Sequence[str]) -> int:
    REPORTS.mkdir(parents=True, exist_ok=True)
    if sound := noticed():
        print(f"These tests fail with nothing broken: {', '.join(sound)}")
        return 1
    lines = ["| broken | how | noticed by |", "|---|---|---|"]
    for name, how in breaks().items():
        if name not in (names or [name]):
            continue
        tests = [f"`{test}`" for test in noticed(name)]
        lines.append(f"| {name.replace('_', ' ')} | {how} | {', '.join(tests) or 'nothing'} |")
        print(lines[-1], flush=True)
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
