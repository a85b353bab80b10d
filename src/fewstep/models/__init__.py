"""Floor 2: image models, what surrounds their denoisers, and how they are sampled."""
