"""Symmetric linear operators: the abstract base, their algebra, and the curvature matrices of a loss."""
