"""Sharpness while training: metrics, when to measure them, what they show, and where the records go."""
