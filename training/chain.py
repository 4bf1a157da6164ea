"""Train Base, Mid and Distilled one after the other in one process, each for its share of so many seconds.

Base goes on from its committed weights with its text encoder as it is, and with --again Mid from its own too, else from
Base. Each part is written to models/ when it is done, so what ends the chain early keeps the parts before.

`python training/chain.py --seconds 300 --device cuda`
"""

from __future__ import annotations

import argparse
from pathlib import Path

import distill
import train_transformer
from export import write_variant
from trainer import CACHE, TrainStep

SHARES = {"base": 0.4, "mid": 0.35, "distilled": 0.25}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300, help="of training; encoding and loading come on top")
    parser.add_argument("--size", default="128")
    parser.add_argument("--batch", default="32")
    parser.add_argument("--clips", default="2400")
    parser.add_argument("--pairs", default="5120")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, default=CACHE)
    parser.add_argument("--again", action="store_true", help="go on with the finished weights of Mid, too")
    parser.add_argument("--no-graphs", action="store_true", help="launch each kernel of a step by itself")
    options = parser.parse_args()
    TrainStep.uses_graphs = not options.no_graphs
    common = ["--size", options.size, "--device", options.device, "--folder", str(options.folder)]
    common += ["--batch", options.batch, "--steps", "1000000"]
    for variant in ("base", "mid"):
        own = ["--again"] if options.again or variant == "base" else []
        own += ["--seconds", str(SHARES[variant] * options.seconds), "--clips", options.clips, "--more", "1000000"]
        train_transformer.main([variant, *own, *common])
        write_variant(variant, options.folder)
    distill.main(["--seconds", str(SHARES["distilled"] * options.seconds), "--pairs", options.pairs, *common])
    write_variant("distilled", options.folder)


if __name__ == "__main__":
    main()
