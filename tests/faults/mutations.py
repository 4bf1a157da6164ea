"""Ways to spoil values, JSON, safetensors files and folders. All of it by a seeded `random.Random`."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

Rng = random.Random

NUMBERS = (0, -1, 1, 2, 3, 7, 64, 1e-9, 0.5, -0.0, 2**31, 2**63, 10**18, 10**400, 1e308, float("nan"), float("inf"))
TEXTS = ("", " ", "x", "0", "true", "NaN", "../..", "a" * 5000, "\ud800", "\x1b[31m", "<img src=x onerror=alert(1)>")


def plain(rng: Rng, depth: int = 0) -> Any:
    """A value as JSON can hold it."""
    kinds: list[Callable[[], Any]] = [
        lambda: rng.choice(NUMBERS),
        lambda: rng.choice(NUMBERS),
        lambda: rng.choice(TEXTS),
        lambda: rng.choice((None, True, False)),
        lambda: [plain(rng, depth + 1) for _ in range(rng.randrange(4))] if depth < 3 else [],
        lambda: {rng.choice(("a", "dtype", "shape", "")): plain(rng, depth + 1)} if depth < 3 else {},
        lambda: nested(50),  # of more, the host itself cannot tell
    ]
    return rng.choice(kinds)()


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def dumps(value: Any) -> str:
    """JSON of a value of any depth: the library's own writer recurses."""
    depth = 0
    inner = value
    while isinstance(inner, list) and len(inner) == 1:
        inner, depth = inner[0], depth + 1
    if depth > 40:
        return "[" * depth + "[]" + "]" * depth
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(str(k))}:{dumps(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(dumps, value)) + "]"
    return json.dumps(value)


def spoil_value(rng: Rng, value: Any) -> Any:
    """A value with one thing in it changed."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(sorted(value))
        changed = dict(value)
        what = rng.randrange(6)
        if what == 0:
            del changed[key]
        elif what == 1:
            changed[rng.choice((*TEXTS, f"{key}x"))] = changed.pop(key)
        else:
            changed[key] = spoil_value(rng, value[key])
        return changed
    if isinstance(value, list) and value and rng.random() < 0.7:
        changed_list = list(value)
        place = rng.randrange(len(value))
        if rng.random() < 0.3:
            del changed_list[place]
        else:
            changed_list[place] = spoil_value(rng, value[place])
        return changed_list
    if isinstance(value, (int, float)) and not isinstance(value, bool) and rng.random() < 0.5:
        return rng.choice((value + 1, value - 1, -value, value * 2, value * 10**6, float(value), str(value)))
    return plain(rng)


def spoil_json(rng: Rng, file: Path) -> str:
    if rng.random() < 0.25:
        return spoil_bytes(rng, file)
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return spoil_bytes(rng, file)
    changed = nested(100_000) if rng.random() < 0.05 else spoil_value(rng, value)
    file.write_text(dumps(changed), encoding="utf-8")
    return f"JSON changed: {dumps(changed)[:300]}"


def spoil_bytes(rng: Rng, file: Path) -> str:
    data = bytearray(file.read_bytes())
    what = rng.randrange(5)
    if what == 0:
        data = data[: rng.randrange(len(data) + 1)]
    elif what == 1:
        data += rng.randbytes(rng.randrange(1, 64))
    elif what == 2 and data:
        start = rng.randrange(len(data))
        data[start : start + rng.randrange(1, 64)] = rng.randbytes(rng.randrange(64))
    else:
        for _ in range(rng.randrange(1, 4)):
            if data:
                data[rng.randrange(min(len(data), 400) if what == 3 else len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(bytes(data))
    return "bytes changed"


def spoil_safetensors(rng: Rng, file: Path) -> str:
    """Header or length changed; the values stay, unless bytes go at random."""
    what = rng.randrange(5)
    if what == 0:
        return spoil_bytes(rng, file)
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header, rest = data[8 : 8 + length], data[8 + length :]
    if what == 1:
        length = rng.choice((0, 1, length - 1, length + 1, length + 8, len(data), 2**31, 2**63, 2**64 - 1))
        file.write_bytes(struct.pack("<Q", length) + header + rest)
        return f"header length {length}"
    values = json.loads(header)
    names = [name for name in values if name != "__metadata__"]
    if what == 2:
        name = rng.choice(names)
        entry = dict(values[name])
        key = rng.choice(("dtype", "shape", "data_offsets"))
        if key == "data_offsets" and rng.random() < 0.5:
            entry[key] = values[rng.choice(names)][key]  # overlaps another
        else:
            entry[key] = spoil_value(rng, entry[key])
        values[name] = entry
        said = f"{name}: {dumps(entry)[:200]}"
    elif what == 3:
        first, second = rng.choice(names), rng.choice(names)
        values[first], values[second] = values[second], values[first]
        said = f"{first} and {second} swapped"
    else:
        values = spoil_value(rng, values)
        said = "an entry changed"
        if rng.random() < 0.1:
            values = {f"blocks.{i}.x": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(100_000)}
            said = "100,000 names"
    text = dumps(values).encode("utf-8", "surrogatepass")
    file.write_bytes(struct.pack("<Q", len(text)) + text + rest)
    return said


def replace_file(rng: Rng, file: Path) -> str:
    """Something else in a file's place: what can be there on a disk."""
    file.unlink()
    what = rng.choice(("nothing", "folder", "fifo", "loop", "dangling", "empty", "sparse", "/dev/zero", "/dev/null"))
    if what == "folder":
        file.mkdir()
    elif what == "fifo":
        os.mkfifo(file)
    elif what == "loop":
        file.symlink_to(file.name)
    elif what == "dangling":
        file.symlink_to("gone")
    elif what == "empty":
        file.touch()
    elif what == "sparse":
        with file.open("wb") as handle:
            handle.truncate(1_500_000_000)
    elif what != "nothing":
        file.symlink_to(what)
    return f"replaced by {what}"


def spoil_folder(rng: Rng, folder: Path) -> str:
    """One of a folder's own folders changed."""
    parts = sorted(path for path in folder.iterdir() if path.is_dir())
    part = rng.choice(parts)
    what = rng.randrange(5)
    if what == 0:
        shutil.rmtree(part)
        return f"{part.name} is gone"
    if what == 1:
        shutil.rmtree(part)
        part.symlink_to(".")
        return f"{part.name} is a link to its own folder"
    if what == 2:
        (part / "a").symlink_to("..")
        (part / "b").symlink_to("..")
        return f"{part.name} holds links in circles"
    if what == 3:
        shutil.rmtree(part)
        part.write_bytes(b"x")
        return f"{part.name} is a file"
    (part / os.fsdecode(b"caf\xe9.safetensors")).write_bytes(b"x" * 20)
    return f"{part.name} holds a file with a name in Latin-1"


def spoil_file(rng: Rng, file: Path) -> str:
    if rng.random() < 0.25:
        return replace_file(rng, file)
    if file.suffix == ".safetensors":
        return spoil_safetensors(rng, file)
    if file.suffix == ".json":
        return spoil_json(rng, file)
    return spoil_bytes(rng, file)
