"""Floor 3: the jobs that need no download: digits, drawn shapes, and the small networks trained for them."""
