"""Floor 2: the training loop and the methods that it runs."""
