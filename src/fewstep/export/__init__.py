"""Floor 4: models for where people use them: diffusers folders and single files, with what they came from."""
