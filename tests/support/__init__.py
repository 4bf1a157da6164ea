"""Real ComfyUI servers and pages, driven from tests, the demo and benchmarks."""
