"""The runner of the suites: side by side, each one's words whole, one line for all, and nothing left running."""

import importlib.util
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
# Of two suites that run side by side each finds the other's file; both are shown whole.
MEETING = """
import time
from pathlib import Path

def test_meets(capfd):
    here = Path(__file__).parents[1]
    (here / "NAME.here").touch()
    end = time.monotonic() + 60
    while not (here / "OTHER.here").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    with capfd.disabled():
        for number in range(50):
            print(f"NAME {number}", flush=True)
            time.sleep(0.01)
"""
WAITING = """
import os, subprocess, sys, time
from pathlib import Path

def test_waits():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    (Path(__file__).parents[1] / "NAME.pid").write_text(f"{os.getpid()} {child.pid}")
    try:
        time.sleep(100)
    finally:
        child.kill()
        child.wait()
        (Path(__file__).parents[1] / "NAME.tidy").touch()
"""


@pytest.fixture
def checkout(tmp_path):
    """A checkout with this runner, and suites that are written with `add`."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "scripts" / "run_tests.py", tmp_path / "scripts")
    (tmp_path / "tests" / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib -p no:cacheprovider\n")
    return tmp_path


@pytest.fixture
def begin(checkout, monkeypatch):
    """Start the runner."""
    monkeypatch.setenv("BROWSER", "0")
    processes = []

    def begin(*suites):
        command = [sys.executable, checkout / "scripts" / "run_tests.py", *suites]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


def add(checkout, suite, text):
    (checkout / "tests" / suite).mkdir()
    (checkout / "tests" / suite / f"test_{suite}.py").write_text(text)


def test_two_suites_run_side_by_side_and_are_shown_one_after_the_other(checkout, begin):
    for name, other in (("core", "host"), ("host", "core")):
        add(checkout, name, MEETING.replace("NAME", name).replace("OTHER", other))
    add(checkout, "server", "def test_fails(): assert False\ndef test_passes(): pass")
    process = begin()
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    shown = [words.split() for words in re.findall(r"(?:core|host) \d+", said)]
    assert shown == [[suite, str(number)] for suite in ("core", "host") for number in range(50)]
    assert said.index("core ---") < said.index("core 0") < said.index("server ---")
    closing = r"===== 3 passed, 1 failed in \d+\.\ds \(core, host, server; failed: server\) ====="
    assert re.fullmatch(closing, said.splitlines()[-1])


def test_all_suites_that_are_there_run_or_those_that_are_named(checkout, monkeypatch):
    monkeypatch.delenv("BROWSER", raising=False)
    for suite in ("core", "gpu", "server"):
        add(checkout, suite, "def test_passes(): pass")
    spec = importlib.util.spec_from_file_location("run_tests", checkout / "scripts" / "run_tests.py")
    runner = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(runner)
    assert runner.plan([]) == ["page", "core", "server"]
    assert runner.plan(["gpu", "server"]) == ["server", "gpu"]
    monkeypatch.setenv("BROWSER", "0")
    assert runner.plan([]) == ["core", "server"]


def test_what_drives_a_browser_is_a_suite_of_its_own(checkout, begin):
    (checkout / "tests" / "pytest.ini").write_text("[pytest]\nmarkers =\n    browser\n")
    marked = "import pytest\n@pytest.mark.browser\ndef test_page(): pass\ndef test_server(): assert False"
    add(checkout, "server", marked)
    for suite, closing in (("page", "1 passed"), ("server", "1 failed")):
        said, _ = begin(suite).communicate(timeout=60)
        assert said.splitlines()[-1].startswith(f"===== {closing} in ")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_ended_it_ends_all_suites_in_order(checkout, begin, how):
    for suite in ("core", "host"):
        add(checkout, suite, WAITING.replace("NAME", suite))
    process = begin()
    files = [checkout / "tests" / f"{suite}.pid" for suite in ("core", "host")]
    end = time.monotonic() + 60
    while not all(file.exists() and file.read_text() for file in files):
        assert time.monotonic() < end
        time.sleep(0.1)
    process.send_signal(how)
    process.communicate(timeout=60)
    assert process.returncode == 128 + how
    assert not [pid for file in files for pid in map(int, file.read_text().split()) if psutil.pid_exists(pid)]
    assert all(file.with_suffix(".tidy").exists() for file in files)
