"""Symmetric linear operators: the base and its algebra, and the curvature matrices of a loss."""
