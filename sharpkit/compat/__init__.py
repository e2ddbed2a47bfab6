"""Other libraries' calls on sharpkit's machinery, so that a script runs after one changed import."""
