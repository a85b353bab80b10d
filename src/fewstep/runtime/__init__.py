"""Floor 1: machinery that knows no diffusion."""
