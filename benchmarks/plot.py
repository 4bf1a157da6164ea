"""Draw a results file as SVG: `python benchmarks/plot.py docs/benchmarks/cpu-2core.json`, beside it by default."""

from __future__ import annotations

import argparse
import json
from html import escape
from pathlib import Path
from typing import Any

WIDTH, LEFT, RIGHT, BAR, GAP, TOP = 760, 190, 150, 20, 14, 64
OURS, GRID, TEXT = "#2f7f5f", "#c8c8c8", "#444"
SHOWN = ("forward_", "chunk_111", "chunk_222")  # rows whose peer is diffusers, but for the next
OWN_PEER = "chunk_222_over_kernels"


def draw(results: dict[str, Any]) -> str:
    """Bars of ratio = peer / ours; the line at 1 is the peer itself."""
    shown = [row for row in results["rows"] if row["name"].startswith(SHOWN) and row["name"] != OWN_PEER]
    rows = [row for row in shown if row["ratio"]]
    height = TOP + len(rows) * (BAR + GAP) + 44
    longest = max(2.0, *(row["ratio"] for row in rows))
    scale = (WIDTH - LEFT - RIGHT) / longest
    machine = results["machine"]
    where = f"{machine['gpu'] or machine['processor']}, {machine['cores']} cores, torch {machine['torch']}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        f'font-size="13" fill="{TEXT}">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        '<text x="16" y="24" font-size="16" font-weight="bold">How many times better than diffusers '
        f"{escape(str(machine['diffusers']))}</text>",
        f'<text x="16" y="44">{escape(where)}; the same weights and inputs, medians</text>',
    ]
    for step in range(int(longest * 2) + 1):
        x = LEFT + step / 2 * scale
        dash = "" if step == 2 else ' stroke-dasharray="2 4"'
        bottom = height - 36
        parts.append(f'<line x1="{x:.1f}" y1="{TOP - 6}" x2="{x:.1f}" y2="{bottom}" stroke="{GRID}"{dash}/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{step / 2:g}x</text>')
    for i, row in enumerate(rows):
        y = TOP + i * (BAR + GAP)
        end = LEFT + row["ratio"] * scale
        numbers = f"{row['ratio']:.2f}x  ({row['ours']:.3g} / {row['peer']:.3g} {row['unit']})"
        parts.append(f'<text x="{LEFT - 8}" y="{y + 15}" text-anchor="end">{escape(row["name"])}</text>')
        parts.append(f'<rect x="{LEFT}" y="{y}" width="{end - LEFT:.1f}" height="{BAR}" fill="{OURS}"/>')
        parts.append(f'<text x="{end + 6:.1f}" y="{y + 15}">{escape(numbers)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    out = options.out or options.results.with_suffix(".svg")
    out.write_text(draw(json.loads(options.results.read_text(encoding="utf-8"))), encoding="utf-8")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
