"""What lies in the folders of models and inputs: official repositories, their CLIP and VAE, prompt files."""
