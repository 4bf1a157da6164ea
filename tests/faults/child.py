"""Runs cases one after the other inside the host, and says on the way what it is at, one line of JSON each."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import traceback
from itertools import count
from pathlib import Path
from typing import Any

from harness.pack import load_comfyui, load_pack

GOOD_GRAPH_EVERY = 4  # cases


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("good", type=Path, help="an official folder of tiny weights")
    parser.add_argument("--seed", required=True)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--family", help="only cases of this one")
    parser.add_argument("--planted", action="store_true")
    options = parser.parse_args()

    report = os.fdopen(os.dup(1), "w", buffering=1)  # the host and its libraries write where they like
    os.dup2(2, 1)

    def say(**what: Any) -> None:
        print(json.dumps(what), file=report, flush=True)

    load_pack()
    load_comfyui(tempfile.mkdtemp(prefix="helios-faults-"))  # below the parent's own temporary folder
    from faults import cases, planted, world

    world.set_up(options.good)
    made = (planted.Planted if options.planted else cases.Cases)(lambda text: say(does=text))
    say(**{"good graph": made.seconds})
    for number in count(options.first):
        if options.family not in (None, made.family(number)):
            continue
        say(begin=number)
        try:
            wrong = made.run(options.seed, number)
        except Exception:  # noqa: BLE001  # a fault of the case, to be seen and mended
            wrong = f"the case itself failed: {traceback.format_exc()}"
        if wrong is None and number % GOOD_GRAPH_EVERY == 0:
            wrong = made.good_graph()
        say(end=number, wrong=wrong)


if __name__ == "__main__":
    sys.exit(main())
