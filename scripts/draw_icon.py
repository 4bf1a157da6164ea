"""Draw docs/icon.png and docs/banner.png for the registry: a sun that rises over a line of frames.

Five of it, each brighter than the one before: a video is made in pieces that see those before them.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[1]
ICON, BANNER = ROOT / "docs" / "icon.png", ROOT / "docs" / "banner.png"
ICON_SIZE, BANNER_SIZE = (400, 400), (1344, 576)  # the registry wants at most 400x400, and 21:9
FINER = 4  # drawn this much larger, for smooth edges

TOP, BOTTOM = (16, 20, 48), (70, 34, 82)  # the sky
SUN, GLOW = (255, 196, 64), (255, 120, 48)
FRAME = (14, 14, 28)
POSITIONS = 5


def sky(width: int, height: int) -> Image.Image:
    share = np.linspace(0, 1, height)[:, None, None] ** 1.5
    rows = np.array(TOP) * (1 - share) + np.array(BOTTOM) * share
    return Image.fromarray(np.broadcast_to(rows, (height, width, 3)).astype(np.uint8)).convert("RGBA")


def add_sun(picture: Image.Image, x: float, y: float, radius: float, share: float) -> None:
    """A disc with a glow around it. share: 0 is hardly there, 1 is the sun as it is now."""
    layer = Image.new("RGBA", picture.size)
    draw = ImageDraw.Draw(layer)
    for ring in range(40, 0, -1):
        reach = radius * (1 + ring / 40)
        draw.ellipse((x - reach, y - reach, x + reach, y + reach), (*GLOW, int(70 * share**2 * (1 - ring / 41) ** 2)))
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), (*SUN, int(40 + 215 * share)))
    picture.alpha_composite(layer)


def add_arc(picture: Image.Image, left: float, right: float, low: float, high: float, radius: float) -> None:
    """The sun's way from the lower left to the upper right, the newest one last."""
    for i in range(POSITIONS):
        share = i / (POSITIONS - 1)
        x = left + (right - left) * share
        y = low + (high - low) * math.sin(share * math.pi / 2)
        add_sun(picture, x, y, radius * (0.5 + 0.5 * share), share**1.5)


def add_film(picture: Image.Image, top: float, height: float) -> None:
    """A strip of film across the picture, with the holes of its edges."""
    draw = ImageDraw.Draw(picture)
    width = picture.width
    draw.rectangle((0, top, width, top + height), FRAME)
    hole, pitch = height * 0.16, height * 0.42
    for i in range(int(width / pitch) + 1):
        x = pitch * (i + 0.5) - hole / 2
        for y in (top + height * 0.14, top + height * 0.70):
            draw.rounded_rectangle((x, y, x + hole, y + hole), hole / 4, (*GLOW, 255))


def icon() -> Image.Image:
    width, height = (side * FINER for side in ICON_SIZE)
    picture = sky(width, height)
    add_arc(picture, 0.16 * width, 0.66 * width, 0.66 * height, 0.32 * height, 0.19 * width)
    add_film(picture, 0.80 * height, 0.20 * height)
    corners = Image.new("L", picture.size)
    ImageDraw.Draw(corners).rounded_rectangle((0, 0, width - 1, height - 1), 0.16 * width, 255)
    picture.putalpha(corners)
    return picture.resize(ICON_SIZE, Image.Resampling.LANCZOS)


def banner() -> Image.Image:
    width, height = (side * FINER for side in BANNER_SIZE)
    picture = sky(width, height)
    add_arc(picture, 0.50 * width, 0.84 * width, 0.66 * height, 0.33 * height, 0.20 * height)
    add_film(picture, 0.86 * height, 0.14 * height)
    draw = ImageDraw.Draw(picture)
    draw.text((0.06 * width, 0.30 * height), "Helios", (255, 244, 224), ImageFont.load_default(0.22 * height))
    lines = "long video for ComfyUI,\n33 frames at a time"
    draw.text((0.064 * width, 0.56 * height), lines, (232, 206, 190), ImageFont.load_default(0.062 * height))
    return picture.convert("RGB").resize(BANNER_SIZE, Image.Resampling.LANCZOS)


def main() -> None:
    icon().save(ICON, optimize=True)
    banner().quantize(256).save(BANNER, optimize=True)


if __name__ == "__main__":
    main()
