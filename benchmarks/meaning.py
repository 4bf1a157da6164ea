"""How often Helios-Tiny's videos show what their prompts say: `make meaning`.

Each video is made by the pack's nodes, with the steps of the workflows, and read by training/detect.py. One line of
build/meaning.jsonl a video: a further run goes on with what is not there, so remove it
after a change of weights or code. The table goes to build/meaning.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import paths  # noqa: F401
from measure import ROOT, machine

RESULT = ROOT / "build" / "meaning.jsonl"
TABLE = ROOT / "build" / "meaning.md"
STEPS = {"base": (50,), "mid": (20, 20, 20), "distilled": (2, 2, 2)}
PROMPTS = 32  # of each kind
COLUMNS = ("colour", "shape", "motion", "together")

Line = dict[str, Any]


def show(variant: str, held_out: bool, number: int, transformer: Path | None) -> Line:
    """What one video shows and ought to, as a line of the result."""
    from detect import find, truth

    from comfyui_helios.host.model.loading import load_model
    from harness.meaning import ask, clips, decode, load, sample, seam_ratios

    clip = clips(number + 1, held_out)[number]
    tiny, caption = load(variant).in_steps(*STEPS[variant]), clip.acts[0].caption
    if transformer is not None:
        tiny = replace(tiny, model=load_model(str(transformer), "fp32"))
    chunks = 2 if variant == "distilled" else len(clip.acts)  # it is quick, and seams take two
    frames = decode(tiny, sample(tiny, ask(tiny, caption), chunks, seed=number))
    return {
        "variant": variant,
        "held_out": held_out,
        "number": number,
        "caption": caption,
        "found": asdict(find(frames)),
        "wanted": asdict(truth(clip, 0)),
        "seams": seam_ratios(frames).tolist(),
    }


def is_at(line: Line, variant: str, held_out: bool, number: int) -> bool:
    return (line["variant"], line["held_out"], line["number"]) == (variant, held_out, number)


def row(name: str, lines: list[Line], others: bool = False) -> str:
    """Shares of right findings; with `others`, of what each of the other prompts asks for."""
    from detect import Finding, count_right

    found, wanted = ([Finding(**line[key]) for line in lines] for key in ("found", "wanted"))
    count = len(lines)
    shifts = range(1, count) if others else [0]
    pairs = [(found[i], wanted[(i + shift) % count]) for shift in shifts for i in range(count)]
    shares = count_right(pairs)
    return f"| {name} | {count} | {' | '.join(f'{100 * shares[column]:.0f} %' for column in COLUMNS)} |"


def table(lines: list[Line]) -> str:
    said = [f"| | prompts | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 2) + "|"]
    for variant in STEPS:
        own = [line for line in lines if line["variant"] == variant]
        for held_out, name in ((False, "seen"), (True, "held out")):
            if kind := [line for line in own if line["held_out"] == held_out]:
                said.append(row(f"{variant.title()}, {name}", kind))
        if len(own) > 1:
            said.append(row(f"{variant.title()}, other prompts", own, others=True))
    wrong: dict[str, Counter[str]] = {}
    for line in lines:
        for part in COLUMNS[:-1]:
            if line["found"][part] != line["wanted"][part]:
                thing = f"{line['wanted']['motion']} of a {line['wanted']['shape']}" if part == "motion" else part
                wrong.setdefault(line["variant"], Counter())[thing] += 1
    faults = [
        f"| {variant.title()} | {', '.join(f'{thing} ({count})' for thing, count in things.most_common())} |"
        for variant, things in sorted(wrong.items())
    ]
    seams = {
        variant: ratios
        for variant in STEPS
        if (ratios := [ratio for line in lines if line["variant"] == variant for ratio in line["seams"]])
    }
    jumps = [f"{variant.title()} {np.mean(ratios):.1f} ({len(ratios)})" for variant, ratios in seams.items()]
    where = machine()
    return "\n".join(
        [
            *said,
            "",
            *(
                ["| | what was wrong, and in how many videos |", "|---|---|", *faults]
                if faults
                else ["Nothing was wrong."]
            ),
            "",
            f"Frames differ at seams, as a multiple of what they do within chunks: {', '.join(jumps)}.",
            "",
            f"{where['processor']}, {where['threads']} thread, PyTorch {where['torch']}, float32.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="held-out ones, and as many seen ones")
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--variants", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--transformer", type=Path, help="takes the place of the variants' own, as a quantised file")
    parser.add_argument("--table", action="store_true", help="of the videos that are there, and make no more")
    options = parser.parse_args()

    from harness.pack import keep_memory, load_comfyui, load_pack, load_training

    with tempfile.TemporaryDirectory(prefix="helios-meaning-") as folder:
        load_pack()
        load_comfyui(folder)
        load_training()
        keep_memory()
        options.result.parent.mkdir(parents=True, exist_ok=True)
        options.result.touch()
        lines = [json.loads(line) for line in options.result.read_text(encoding="utf-8").splitlines()]
        wanted = [
            (v, held, number) for number in range(options.prompts) for v in options.variants for held in (True, False)
        ]
        for key in [] if options.table else wanted:
            if not any(is_at(line, *key) for line in lines):
                lines.append(show(*key, options.transformer))
                with options.result.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(lines[-1]) + "\n")
        text = table(lines)
        TABLE.write_text(text + "\n", encoding="utf-8")
        print(text)


if __name__ == "__main__":
    main()
