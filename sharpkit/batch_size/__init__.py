"""How the largest learning rate depends on the batch size: measured curvature, noise, limits, short calibrating runs."""
