"""Studies: recipes x seeds, one YAML each, and how they are read."""
