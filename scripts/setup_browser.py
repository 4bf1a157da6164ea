"""See to it that there is a Chromium for the browser tests: the system's, a distribution's package, or Playwright's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from harness.browser import NO_BROWSER, find_chromium


def works(path: str | None) -> bool:
    """Some distributions' package is an empty shell that asks for another installer."""
    return path is not None and subprocess.run([path, "--version"], capture_output=True).returncode == 0


def installers() -> list[list[list[str]]]:
    """Ways to install one, best first; each is a list of commands."""
    ways = []
    if shutil.which("apt-get") and os.geteuid() == 0:
        install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium"]
        ways.append([["apt-get", "update", "-qq"], install])
    ways.append([[sys.executable, "-m", "playwright", "install", "chromium"]])
    return ways


def main() -> int:
    if works(find_chromium()):
        return 0
    for commands in installers():
        print("no Chromium yet:", " && ".join(map(" ".join, commands)), flush=True)
        if all(subprocess.run(command, stdin=subprocess.DEVNULL).returncode == 0 for command in commands) and works(
            find_chromium()
        ):
            return 0
    print(NO_BROWSER, file=sys.stderr)
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
