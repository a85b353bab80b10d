"""Floor 4: one file per verb; each composes the floors below."""
