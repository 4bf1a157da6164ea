"""Parts of a long run: each a process with a time limit, a file of its own and a log, so that whatever ends the run
keeps what it has.

A part's file holds its state and its rows, and grows row by row. A part that ends with the status MISSING lacks
something, which the last line of its log names; one that fails or overruns its limit is killed with all it started, and
the rest goes on. The summary is made of the files alone.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import signal
import subprocess
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # it comes with torch, which running parts does without
    from measure import Row

MISSING = 77  # the exit status by which test tools say that they were skipped
PATIENCE = 2  # a part may take this many times what it is expected to
FINISHED, RUNNING = "done", "running"
STATES = {RUNNING: "cut off", "": "not run yet"}  # as the summary has it; the others as they are


class MissingError(RuntimeError):
    """A part cannot run on this machine: what it lacks, and where it is from."""


@dataclass(frozen=True)
class Part:
    """One process of a run. It appends to the file by `add_row`."""

    name: str
    seconds: float  # that it is expected to take
    command: Sequence[str]
    about: Mapping[str, Any] = field(default_factory=dict)  # what its rows are of, beside what all are of


def require(*modules: str) -> None:
    """Raises MissingError, for a part to begin with."""
    if absent := [module for module in modules if importlib.util.find_spec(module) is None]:
        raise MissingError(f"{' and '.join(absent)} not installed")


def add_row(file: Path, row: Row) -> None:
    content = read(file)
    _write(file, {**content, "rows": [*content["rows"], asdict(row)]})


def read(file: Path) -> dict[str, Any]:
    """A part's file; one without state and rows where there is none yet."""
    if not file.exists():
        return {"state": "", "note": "", "rows": []}
    return dict(json.loads(file.read_text(encoding="utf-8")))


def run(
    parts: Sequence[Part],
    folder: Path,
    about: dict[str, Any],
    *,
    chosen: Collection[str],
    seconds: float = math.inf,
    fresh: bool = False,
) -> bool:
    """Run the chosen parts one after the other; False if one failed or overran.

    about is kept with the rows: parts that are finished, with the same about, are not run again but for `fresh`. A part
    that is expected to take more than what is left of the seconds is left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + seconds
    good = True
    for part in parts:
        if part.name not in chosen:
            continue
        of_part = {**about, **part.about}
        file, left = folder / f"{part.name}.json", deadline - time.monotonic()
        before = read(file)
        if not fresh and before["state"] == FINISHED and before["about"] == of_part:
            print(f"{part.name:24} kept from before", flush=True)
            continue
        if left < part.seconds:
            note = f"it is expected to take {part.seconds:.0f} s, and {max(left, 0):.0f} s were left"
            if not before["rows"]:
                _write(file, {"part": part.name, "state": "left out", "note": note, "about": of_part, "rows": []})
            print(f"{part.name:24} left out: {note}", flush=True)
            continue
        _write(file, {"part": part.name, "state": RUNNING, "note": "", "about": of_part, "rows": []})
        start = time.monotonic()
        state, note = _execute(part, folder / f"{part.name}.log", min(PATIENCE * part.seconds, left))
        took = round(time.monotonic() - start, 1)
        _write(file, {**read(file), "state": state, "note": note, "seconds": took})
        print(f"{part.name:24} {state} after {took:.0f} s{': ' if note else ''}{note}", flush=True)
        good = good and state in (FINISHED, "missing")
        summarise(parts, folder)
    summarise(parts, folder)
    return good


def summarise(parts: Sequence[Part], folder: Path) -> str:
    """Write summary.json and summary.md from the files that are there; returns the latter."""
    contents = [{**read(folder / f"{part.name}.json"), "part": part.name} for part in parts]
    lines = []
    for about in _distinct([content["about"] for content in contents if "about" in content]):
        names = [content["part"] for content in contents if content.get("about") == about]
        lines += [f"{_told(about)}: {', '.join(names)}.", ""]
    lines += ["| part | row | ours | peer | ratio | unit | note |", "|---|---|---:|---:|---:|---|---|"]
    for content in contents:
        if content["state"] != FINISHED:
            state = STATES.get(content["state"], content["state"])
            lines.append(_line(content["part"], f"**{state}**", note=content["note"]))
        for row in content["rows"]:
            ours, peer, ratio = ("" if row[key] is None else f"{row[key]:.4g}" for key in ("ours", "peer", "ratio"))
            lines.append(_line(content["part"], row["name"], ours or "open", peer, ratio, row["unit"], row["note"]))
    text = "\n".join(lines) + "\n"
    _write(folder / "summary.json", {"parts": contents})
    (folder / "summary.md").write_text(text, encoding="utf-8")
    return text


def _line(part: str, name: str, ours: str = "", peer: str = "", ratio: str = "", unit: str = "", note: str = "") -> str:
    return f"| {part} | {name} | {ours} | {peer} | {ratio} | {unit} | {note.replace('|', '/')} |"


def _told(about: dict[str, Any]) -> str:
    machine = about["machine"]
    words = [f"{name} {machine[name]}" for name in ("driver", "torch", "triton", "commit") if machine.get(name)]
    words += [f"ComfyUI {about['comfyui']}"] if about.get("comfyui") else []
    return f"{about['network']} on {machine['gpu'] or machine['processor']}, {', '.join(words)}"


def _distinct(values: list[Any]) -> list[Any]:
    return [value for i, value in enumerate(values) if value not in values[:i]]


def _execute(part: Part, log: Path, limit: float) -> tuple[str, str]:
    """Returns the state that the part ends in, and a note."""
    with log.open("wb") as stream:
        # A group of its own, to be killed with all that it has started.
        process = subprocess.Popen(
            part.command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, process_group=0
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            return "timed out", f"killed after {limit:.0f} s; {log.name} says how far it came"
        finally:
            _kill_group(process.pid)
            process.wait()
    if status == 0:
        return FINISHED, ""
    if status < 0:
        return "failed", f"ended by {signal.Signals(-status).name}"
    said = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return "missing" if status == MISSING else "failed", said[-1] if said else f"status {status}"


def _kill_group(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:  # all of it has ended
        return


def _write(file: Path, content: dict[str, Any]) -> None:
    new = file.with_suffix(".new")
    new.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    new.replace(file)
