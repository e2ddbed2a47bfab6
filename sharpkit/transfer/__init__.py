"""Do hyperparameters transfer from narrow to wide (and shallow to deep) networks? ``sk.transfer`` measures, and says which rule is broken."""
