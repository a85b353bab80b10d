"""Floor 1: real images, and the order in which training sees them."""
