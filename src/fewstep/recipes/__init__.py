"""Floor 5: a run's settings. `schema.py` says what a recipe can hold; the YAML files beside it are data, no logic."""
