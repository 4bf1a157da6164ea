"""What lies in the models folders: official repositories, their CLIP and VAE, prompt files."""
