"""Helios: a 14B autoregressive video diffusion transformer (arXiv 2603.04379), without any host around it."""
