"""From the inputs of a sampling node to latents."""
