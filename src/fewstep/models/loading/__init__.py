"""Models from folders, single files, the hub and EDM's checkpoints; nothing in them is executed."""
