"""One real server with tiny weights for the whole session, and ComfyUI's page in a real browser."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import convert_checkpoint
import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import Browser
from safetensors.torch import save_file
from spandrel.architectures.Compact.__arch.SRVGG import SRVGGNetCompact

from harness.browser import Page, chromium, open_page, write_settings
from harness.client import run_workflow
from harness.host import ROOT, Host
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
def files(server: Host, models: Path) -> Path:
    """The files our workflows name: models made of the tiny folder, by our converter and by the host, and inputs."""
    folder = models / "diffusers" / "Helios-Distilled"
    if os.environ.get("UPDATE_PICTURES"):  # which show more of a model that has learnt something
        folder = ROOT / "models" / "Helios-Tiny-Distilled"
    target = models / "diffusion_models" / "helios_distilled_bf16.safetensors"
    assert convert_checkpoint.main([str(folder), str(target)]) == 0
    graph = {
        "1": {"class_type": "HeliosDiffusersLoader", "inputs": {"folder": folder.name, "dtype": "auto"}},
        "2": {"class_type": "VAESave", "inputs": {"vae": ["1", 2], "filename_prefix": "vae/tiny"}},
    }
    run_workflow(server.url, graph)
    [saved] = (server.output / "vae").glob("tiny*.safetensors")
    shutil.copy(saved, models / "vae" / "wan_2.1_vae.safetensors")
    # Only its name is read: the page looks for it.
    (models / "text_encoders" / "umt5_xxl_fp8_e4m3fn_scaled.safetensors").touch()
    torch.manual_seed(0)
    upscaler = SRVGGNetCompact(num_feat=8, num_conv=2, upscale=2)
    torch.nn.init.zeros_(upscaler.body[-1].weight)  # what it adds to the enlarged image
    save_file(upscaler.state_dict(), models / "upscale_models" / "2x_upscaler.safetensors")
    inputs = server.base / "input"
    frames = circling_ball(40, 96, 160)
    Image.fromarray(frames[0]).save(inputs / "example.png")
    with av.open(str(inputs / "video.mp4"), "w") as container:
        stream = container.add_stream("h264", rate=24)
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())
    (inputs / "prompts.txt").write_text(
        "# two prompts\nA small red ball bounces up and down.\nA big blue square spins clockwise.\n"
    )
    return models


def circling_ball(frames: int, height: int, width: int) -> np.ndarray:
    """A small red ball that circles counterclockwise on black, as Helios-Tiny knows it: (T, height, width, 3) uint8."""
    turns = 2 * np.pi * np.arange(frames)[:, None, None] / 54
    y, x = (np.indices((height, width)) - np.array([height, width])[:, None, None] / 2) / height
    ball = (x - 0.21 * np.cos(turns)) ** 2 + (y + 0.21 * np.sin(turns)) ** 2 < 0.105**2
    return np.where(ball[..., None], (230, 26, 31), 15).astype(np.uint8)


@pytest.fixture(scope="session")
def info(server: Host, files: Path) -> dict[str, Any]:
    return dict(server.get("/object_info"))


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, server: Host) -> Iterator[Page]:
    """The server's page, freshly opened. A test that takes it needs the marker `browser`."""
    with open_page(browser, server.url) as page:
        yield page


@pytest.fixture(scope="session")
def shared_page(browser: Browser, server: Host, files: Path) -> Iterator[Page]:
    """Opened when all files are there, of which it makes lists."""
    with open_page(browser, server.url) as page:
        yield page


@pytest.fixture
def used_page(shared_page: Page) -> Page:
    """The server's page with an empty graph, opened once for all tests: quicker than `page`."""
    shared_page.clear()
    return shared_page
