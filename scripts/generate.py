"""A video's latents by the core alone: python scripts/generate.py REPOSITORY PROMPT.npy OUT.npy

Needs `pip install '.[core]'`. PROMPT is (1, 512, 4096): UMT5-XXL's last hidden state of the prompt's tokens (at most
512, the last an end of sequence) and zeros behind them, as by transformers' UMT5EncoderModel. OUT are latents of eight
chunks at 640x384, normalised; a VAE decodes each nine latent frames on their own.
"""

import sys

import numpy as np
import torch

from helios_core.generate import Run, generate
from helios_core.history import Memory
from helios_core.loading import load_transformer
from helios_core.predict import bind_transformer
from helios_core.schedule import DISTILLED

if len(sys.argv) != 4:
    sys.exit(__doc__)
repository, prompt, out = sys.argv[1:]
device = "cuda" if torch.cuda.is_available() else "cpu"

with torch.inference_mode():
    transformer = load_transformer(repository).to(device)
    bind = bind_transformer(transformer, DISTILLED, torch.from_numpy(np.load(prompt)).to(device))
    memory = Memory.empty(batch=1, height=384 // 8, width=640 // 8).to(device)
    run = Run(DISTILLED, memory, chunks=8, rng=torch.Generator().manual_seed(0))
    chunks = [chunk.latents.cpu() for chunk in generate(bind, run)]

np.save(out, torch.cat(chunks, dim=2).numpy())
