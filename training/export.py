"""Write a finished part of Helios-Tiny to models/: `tokenizer`, or a variant with what it adds.

`python training/export.py base` takes the averaged weights of the run in the cache folder, and of Base the text encoder
too. The VAE is written by `fold_vae.py`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from parts import Variant, weights_folder
from sample import make_scheduler
from text import save_tokenizer
from train_transformer import load_average
from trainer import CACHE, log, start_logging


def write_variant(variant: Variant, folder: Path) -> None:
    transformer, encoder = load_average(variant, folder, "cpu")
    target = weights_folder(variant)
    transformer.to(torch.bfloat16).save_pretrained(target / "transformer")
    if variant == "base":  # the others leave it as it is
        encoder.to(torch.bfloat16).save_pretrained(weights_folder() / "text_encoder")
    scheduler = make_scheduler(variant)
    scheduler.save_pretrained(target / "scheduler")
    index: dict[str, Any] = {
        "_class_name": "HeliosPipeline" if variant == "base" else "HeliosPyramidPipeline",
        "_diffusers_version": "0.42.1",
        "scheduler": ["diffusers", type(scheduler).__name__],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", "HeliosTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    if variant != "base":
        index |= {"is_cfg_zero_star": variant == "mid", "is_distilled": variant == "distilled"}
    (target / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("tokenizer", "base", "mid", "distilled"))
    parser.add_argument("--folder", type=Path, default=CACHE)
    options = parser.parse_args()
    start_logging()
    if options.part == "tokenizer":
        save_tokenizer(weights_folder() / "tokenizer")
    else:
        write_variant(options.part, options.folder)
    log.info("wrote %s", options.part)


if __name__ == "__main__":
    main()
