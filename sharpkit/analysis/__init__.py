"""What the numbers mean: sharpness summaries, stability limits, diagnosis of an objective."""
