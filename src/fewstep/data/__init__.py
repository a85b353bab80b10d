"""Floor 1: real images, and what is computed of them once and kept."""
