"""What curvature says at one point of training: sharpness, stability limits, layers, and whether to trust it."""
