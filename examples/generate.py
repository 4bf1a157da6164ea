"""A video's latents without ComfyUI: python examples/generate.py REPOSITORY PROMPT.npy OUT.npy

PROMPT is (1, 512, 4096), as UMT5-XXL encodes it. `pip install '.[core]'` is all this needs.
"""

import sys

import numpy as np
import torch

from helios_core.generate import Run, generate
from helios_core.history import Memory
from helios_core.loading import load_transformer
from helios_core.predict import bind_transformer
from helios_core.schedule import DISTILLED

repository, prompt, out = sys.argv[1:]
device = "cuda" if torch.cuda.is_available() else "cpu"

with torch.inference_mode():
    transformer = load_transformer(repository).to(device)
    bind = bind_transformer(transformer, DISTILLED, torch.from_numpy(np.load(prompt)).to(device))
    memory = Memory.empty(batch=1, height=384 // 8, width=640 // 8).to(device)
    run = Run(DISTILLED, memory, chunks=8, rng=torch.Generator().manual_seed(0))
    chunks = [chunk.latents.cpu() for chunk in generate(bind, run)]

np.save(out, torch.cat(chunks, dim=2).numpy())  # normalised; a VAE decodes each nine latent frames on their own
