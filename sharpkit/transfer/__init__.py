"""Do hyperparameters transfer from narrow to wide, or shallow to deep, networks? ``sk.transfer`` measures and names the broken rule."""
