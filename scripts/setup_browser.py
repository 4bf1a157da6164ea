"""See to it that there is a Chromium for the browser tests: one that is here, or a distribution's signed package.

Playwright's own would come without a hash or a signature that is checked, so nobody gets it unasked.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from harness.browser import NO_BROWSER, find_chromium


def works(path: str | None) -> bool:
    """Some distributions' package is an empty shell that asks for another installer."""
    return path is not None and subprocess.run([path, "--version"], capture_output=True).returncode == 0


def install() -> bool:
    """Whether the distribution's package could be installed."""
    if not shutil.which("apt-get") or os.geteuid() != 0:
        return False
    package = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium"]
    for command in (["apt-get", "update", "-qq"], package):
        print("no Chromium yet:", " ".join(command), flush=True)
        if subprocess.run(command, stdin=subprocess.DEVNULL).returncode:
            return False
    return True


def main() -> int:
    if works(find_chromium()) or (install() and works(find_chromium())):
        return 0
    print(NO_BROWSER, file=sys.stderr)
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
