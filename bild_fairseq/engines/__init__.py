"""Forward passes: how a model is run."""
