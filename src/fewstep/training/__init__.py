"""Floor 4: the training loop and the methods that it runs."""
