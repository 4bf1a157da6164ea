"""What travels on sockets: LATENT, CONDITIONING, images and videos, prompts."""
