"""Floor 1: what a network eats. Every denoiser is a diffusers model behind an adapter."""
