"""Floor 6: one file per verb; each composes the floors below."""
