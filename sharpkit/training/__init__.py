"""Measuring while training."""
