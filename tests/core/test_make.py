"""make and the scripts treat a path as one path, and remove nothing that they have not made."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="make is not here")


@pytest.fixture
def checkout(tmp_path):
    """A copy of what make needs, in a folder with a space in its name."""
    target = tmp_path / "my checkout"
    for name in ("Makefile", "requirements.txt", "scripts", "tests/requirements"):
        source = ROOT / name
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target / name)
    return target


@pytest.fixture
def removed(tmp_path):
    """What `rm` was asked to remove, a path each. It removes nothing: a test that fails must do no harm."""
    log = tmp_path / "tools" / "removed"
    log.parent.mkdir()
    rm = log.with_name("rm")
    rm.write_text(f'#!/bin/sh\nfor path in "$@"; do echo "$path" >>\'{log}\'; done\n')
    rm.chmod(0o755)
    log.touch()
    return lambda: [line for line in log.read_text().splitlines() if not line.startswith("-")]


def run(checkout, *arguments, **variables):
    command = ["make", *arguments, *(f"{name}={value}" for name, value in variables.items())]
    tools, home = checkout.parent / "tools", checkout.parent  # and not the VENV of a `make test` around us
    env = {"PATH": f"{tools}:{os.environ['PATH']}", "HOME": str(home)}
    result = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def make_environment(path, ours=True):
    """An environment as setup_env.sh leaves it, or one of somebody else in which `make setup` has installed."""
    (path / "bin").mkdir(parents=True)
    for name in ("pyvenv.cfg", ".installed", *([".made_by_setup"] if ours else [])):
        (path / name).touch()
    return path


BUILT = ["build", ".pytest_cache", ".ruff_cache", ".mypy_cache"]


def test_clean_removes_an_environment_with_a_space_and_nothing_beside_it(checkout, tmp_path, removed):
    venv = make_environment(tmp_path / "my env")
    run(checkout, "clean", VENV=venv)
    assert removed() == [*BUILT, str(venv)]


@pytest.mark.parametrize("name", [".venv", "my env"])
def test_clean_leaves_an_environment_that_setup_has_not_made(checkout, tmp_path, removed, name):
    venv = make_environment(tmp_path / name, ours=False)
    assert f"'{venv}' stays: make setup has not made it." in run(checkout, "clean", VENV=venv)
    assert removed() == BUILT


@pytest.mark.parametrize("venv", ["", ".", "/", "scripts"])
def test_clean_leaves_what_is_no_environment(checkout, removed, venv):
    run(checkout, "clean", VENV=venv)
    assert removed() == BUILT


def test_clean_of_a_fresh_checkout_says_nothing(checkout, removed):
    assert "stays" not in run(checkout, "clean")


def test_every_command_has_its_paths_in_quotes(checkout, tmp_path):
    venv = tmp_path / "my env"
    python = tmp_path / "my python"
    requirements = tmp_path / "my requirements.txt"
    requirements.touch()
    targets = (
        "setup",
        "demo",
        "test",
        "test-core",
        "soak",
        "soak-live",
        "bench",
        "bench-gpu",
        "pictures",
        "lint",
        "format",
        "clean",
    )
    shown = run(checkout, "-n", *targets, VENV=venv, PYTHON=python, HOST_REQUIREMENTS=requirements)
    for path in (venv, python, requirements):
        lines = [line for line in shown.splitlines() if str(path) in line]
        assert lines
        assert all(str(path) not in line.replace(f'"{path}', "") for line in lines), lines


def test_what_is_installed_is_not_installed_again(checkout, tmp_path):
    venv = make_environment(tmp_path / "my env")
    assert "setup_env.sh" not in run(checkout, "-n", "test-core", VENV=venv)


def test_a_new_environment_is_marked_as_made_here(checkout, tmp_path):
    requirements = tmp_path / "no requirements.txt"
    requirements.touch()
    venv = tmp_path / "my env"
    subprocess.run([checkout / "scripts" / "setup_env.sh", "python3", venv, requirements], check=True, timeout=120)
    assert (venv / ".made_by_setup").exists()
    (venv / ".made_by_setup").unlink()
    subprocess.run([checkout / "scripts" / "setup_env.sh", "python3", venv, requirements], check=True, timeout=120)
    assert not (venv / ".made_by_setup").exists()


def test_the_host_is_not_unpacked_over_something_else(checkout, tmp_path, removed):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    env = {"PATH": f"{tmp_path / 'tools'}:{os.environ['PATH']}"}
    result = subprocess.run(
        [checkout / "scripts" / "setup_host.sh", "false", tmp_path / "mine"], env=env, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert "is in the way of the ComfyUI to test with" in result.stderr
    assert removed() == []
