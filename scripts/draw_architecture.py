"""Draw docs/architecture.svg from the imports: three floors, their rooms, and who imports whom how often."""

from __future__ import annotations

import ast
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "architecture.svg"

NODES, HOST, CORE = "nodes", "host", "helios_core"
WIDTH, MARGIN, GAP = 1240, 20, 14
LINE, TITLE = 17, 26  # heights of a line of text and of a room's title
SPACE = 62  # between two floors, for the arrows
LANE = 22  # height of the way from a room to others on its floor
PASSAGE = 40  # width of the way past the host, from the nodes to the core
COLOURS = {NODES: "#e8f1fb", HOST: "#eef7e9", CORE: "#fdf3e3"}


def room_files() -> dict[str, list[Path]]:
    """The files of each room: a floor's own ones, or those of a folder on it."""
    rooms: dict[str, list[Path]] = {}
    for floor in (NODES, HOST, CORE):
        for file in sorted((ROOT / floor).rglob("*.py")):
            rooms.setdefault(file.parent.relative_to(ROOT).as_posix(), []).append(file)
    return rooms


def imported_rooms(file: Path, rooms: Iterable[str]) -> Iterator[str]:
    """The room of each relative import in a file: the longest that the imported name begins with."""
    folder = file.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            parts = (*folder[: len(folder) - node.level + 1], *(node.module or "").split("."))
            paths = ["/".join(parts[:end]) for end in range(len(parts), 0, -1)]
            yield next(path for path in paths if path in rooms)


def count_imports(rooms: dict[str, list[Path]]) -> Counter[tuple[str, str]]:
    """How many imports lead from one room to another."""
    pairs = ((room, other) for room, files in rooms.items() for file in files for other in imported_rooms(file, rooms))
    return Counter((room, other) for room, other in pairs if room != other)


def text(x: float, y: float, words: str, kind: str = "name") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(words)}</text>'


def arrow(points: list[tuple[float, float]], count: int) -> list[str]:
    """A line along the points, with its number of imports beside its head; nothing where there are none."""
    if not count:
        return []
    x, y = points[-1]
    down = y > points[-2][1]
    path = " ".join(f"{px:g},{py:g}" for px, py in points)
    return [f'<polyline points="{path}" marker-end="url(#head)"/>', text(x + 5, y - 12 if down else y + 17, str(count))]


def box(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" fill="{colour}"/>'


def about(room: str) -> str:
    """The first line of what a room says of itself."""
    doc = ast.get_docstring(ast.parse((ROOT / room / "__init__.py").read_text(encoding="utf-8"))) or ""
    return doc.partition("\n")[0]


def names(files: list[Path]) -> list[str]:
    return [file.stem for file in files if file.stem != "__init__"]


def hall(room: str, y: float, files: list[Path], columns: int) -> tuple[list[str], float]:
    """A floor of one room, as wide as the house, and where it ends."""
    listed = names(files)
    rows = -(-len(listed) // columns)
    step = (WIDTH - 2 * MARGIN - 2 * GAP) / columns
    parts = [text(MARGIN + GAP, y + TITLE - 7, f"{room}/", "title")]
    parts += [text(MARGIN + GAP + 110, y + TITLE - 7, about(room), "about")]
    parts += [
        text(MARGIN + GAP + (i // rows) * step, y + TITLE + 14 + (i % rows) * LINE, name)
        for i, name in enumerate(listed)
    ]
    height = TITLE + 14 + rows * LINE
    return [box(MARGIN, y, WIDTH - 2 * MARGIN, height, COLOURS[room]), *parts], y + height


def wing(room: str, files: list[Path], x: float, y: float, intro: list[str], lines: int) -> list[str]:
    """A room of the host's floor, with so many lines for what it says of itself."""
    first = y + TITLE + lines * LINE + 14
    return [
        text(x + 8, y + 18, f"{room}/", "title"),
        *(text(x + 8, y + TITLE + 8 + i * LINE, line, "about") for i, line in enumerate(intro)),
        *(text(x + 8, first + i * LINE, name) for i, name in enumerate(names(files))),
    ]


def draw() -> str:
    rooms = room_files()
    imports = count_imports(rooms)
    wings = [room for room in rooms if room.split("/")[0] == HOST]
    reach = {room: sum((room, other) in imports for other in wings) for room in wings}
    wings.sort(key=lambda room: (-reach[room], room))  # who imports most stands left: arrows go to the right
    beside = [room for room in wings if reach[room]]

    width = (WIDTH - 2 * MARGIN - GAP * (len(wings) + 1) - PASSAGE) / len(wings)
    left = {room: MARGIN + GAP + i * (width + GAP) for i, room in enumerate(wings)}
    intros = {room: textwrap.wrap(about(room), int(width / 7)) for room in wings}
    intro_lines = max(map(len, intros.values()))

    nodes, nodes_end = hall(NODES, MARGIN, rooms[NODES], columns=6)
    start = nodes_end + SPACE
    top = start + TITLE + 8
    bottom = top + TITLE + (intro_lines + max(len(names(rooms[room])) for room in wings)) * LINE + 14
    end = bottom + (len(beside) + 1) * LANE
    core, height = hall(CORE, end + SPACE, rooms[CORE], columns=6)

    parts = [box(MARGIN, start, WIDTH - 2 * MARGIN - PASSAGE, end - start, COLOURS[HOST])]
    parts += [text(MARGIN + GAP, start + TITLE - 7, f"{HOST}/", "title")]
    for room, x in left.items():
        parts += [box(x, top, width, bottom - top, "#ffffff")]
        parts += wing(room, rooms[room], x, top, intros[room], intro_lines)
        parts += arrow([(x + width - 30, nodes_end), (x + width - 30, top)], imports[NODES, room])
        parts += arrow([(x + 14, bottom), (x + 14, end + SPACE)], imports[room, CORE])
    for number, room in enumerate(beside):
        out, lane = left[room] + width - 16, bottom + (number + 1) * LANE
        for other in wings:
            into = left[other] + 40 + number * 24
            parts += arrow([(out, bottom), (out, lane), (into, lane), (into, bottom)], imports[room, other])
    passing = WIDTH - MARGIN - PASSAGE / 2 - 4
    parts += arrow([(passing, nodes_end), (passing, end + SPACE)], imports[NODES, CORE])
    return "\n".join([*head(height + MARGIN), *nodes, *parts, *core, "</svg>", ""])


def head(height: float) -> list[str]:
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" font-family="sans-serif">',
        "<title>The three floors of ComfyUI-Helios, and the number of imports from room to room</title>",
        "<style>text { font-size: 12px; fill: #222 } .title { font-size: 14px; font-weight: bold } "
        ".about { fill: #666; font-style: italic } polyline { fill: none; stroke: #567; stroke-width: 1.2 }</style>",
        '<marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0,0 L8,4 L0,8 z" fill="#567"/></marker>',
        f'<rect width="{WIDTH}" height="{height:g}" fill="#ffffff"/>',
    ]


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
