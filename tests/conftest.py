"""Loads the checkout as the package `comfyui_helios`, by path, as ComfyUI does: tests import it by that name."""

from __future__ import annotations

import os

import pytest

from harness.pack import load_pack

load_pack()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ.get("BROWSER") != "0":
        return
    browser = [item for item in items if item.get_closest_marker("browser")]
    items[:] = [item for item in items if item not in browser]
    config.hook.pytest_deselected(items=browser)
    config.stash[left_out] = len(browser)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if count := config.stash.get(left_out, 0):
        terminalreporter.write_line(f"BROWSER=0: {count} browser tests were left out", yellow=True)


left_out = pytest.StashKey[int]()
