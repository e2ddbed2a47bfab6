"""Spectral algorithms over any symmetric operator; nothing here knows a model or data."""
