"""The recording on the help page of Helios Stream Video: the real page, steered, as an animated webp.

`python scripts/record_live.py`, after a change of the player. Helios-Tiny makes the video; a picture is taken four
times a second, and shown as long as it was there.
"""

from __future__ import annotations

import io
import itertools
import tempfile
import time
from pathlib import Path

from PIL import Image

from harness.browser import Page, chromium, open_page, write_settings
from harness.host import ROOT, Host
from harness.small import read_workflow

TARGET = ROOT / "web" / "docs" / "helios_live.webp"
LIMIT = 300_000  # bytes
SECONDS, PAUSE = 24, 0.25
WIDTH = 360  # pixels
NEXT = "A big blue square spins clockwise on a black background."
SET = """() => { for (const node of app.graph.nodes) for (const widget of node.widgets ?? []) {
    if (widget.name === 'frames') widget.value = 330
    if (widget.name === 'seed') widget.value = 42 } }"""
BOX = """() => { const box = document.querySelector('.helios-live').getBoundingClientRect()
    return [box.x - 8, box.y - 8, box.width + 16, box.height + 16] }"""


def record() -> list[tuple[Image.Image, float]]:
    """Pictures of the player, each with when it was taken."""
    pictures: list[tuple[Image.Image, float]] = []
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        base = Path(folder)
        write_settings(base)
        with Host(base) as host, open_page(browser, host.url, width=1600, height=1000) as page:
            page.load(read_workflow("helios_live"))
            page.page.evaluate(SET)
            page.page.evaluate("() => app.queuePrompt(0)")
            page.page.wait_for_function(
                "document.querySelector('.helios-live video')?.currentTime > 0", timeout=300_000
            )
            box = page.page.locator(".helios-steering textarea")
            page.page.locator(".helios-steering input").fill("1")
            begin = time.monotonic()
            for word in ("", *NEXT.split()):
                box.press_sequentially(f"{word} " if word else "")
                pictures.append(picture(page))
            page.page.get_by_role("button", name="Apply").click()
            while time.monotonic() < begin + SECONDS:
                pictures.append(picture(page))
                page.page.wait_for_timeout(1000 * PAUSE)
    return pictures


def picture(page: Page) -> tuple[Image.Image, float]:
    x, y, width, height = page.page.evaluate(BOX)
    shot = page.page.screenshot(clip={"x": x, "y": y, "width": width, "height": height})
    image = Image.open(io.BytesIO(shot)).convert("RGB")
    return image.resize((WIDTH, round(WIDTH * image.height / image.width))), time.monotonic()


def main() -> None:
    pictures = record()
    images, times = zip(*pictures, strict=True)
    shown = [round(1000 * (after - at)) for at, after in itertools.pairwise(times)] + [1500]
    for quality in (70, 50, 30, 15):
        size = images[0].size
        images[0].save(
            TARGET,
            save_all=True,
            append_images=[image.resize(size) for image in images[1:]],
            duration=shown,
            loop=0,
            quality=quality,
            method=6,
        )
        if TARGET.stat().st_size <= LIMIT:
            break
    print(f"{TARGET}: {len(images)} pictures, {TARGET.stat().st_size} bytes")


if __name__ == "__main__":
    main()
