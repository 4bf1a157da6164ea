"""One real server with tiny weights for the whole session, and ComfyUI's page in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from harness.browser import Page, chromium, open_page, write_settings
from harness.host import Host
from harness.models import make_tiny_models


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ComfyUI models folder with diffusers/Helios-{Base,Mid,Distilled} of tiny random weights."""
    return make_tiny_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    base = tmp_path_factory.mktemp("server")
    write_settings(base)
    with Host(base, models=models) as host:
        yield host


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, server: Host) -> Iterator[Page]:
    """The server's page, freshly opened. A test that takes it needs the marker `browser`."""
    with open_page(browser, server.url) as page:
        yield page
