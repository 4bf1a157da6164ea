"""What tests, benchmarks and the demo share: a real ComfyUI and its page, tiny weights, the reference.

Whoever imports it has scripts/ on the path, as each script there has anyway.
"""
