"""Floor 4: what generated images are judged by, and the report."""
