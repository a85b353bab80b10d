"""Floor 0: the mathematics of diffusion; imports nothing but torch."""
