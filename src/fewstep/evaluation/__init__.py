"""Floor 2: generating images to be judged, judging them, and the report."""
