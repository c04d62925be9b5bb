"""How does a model learn? The step, the loop around it, and what the user sees of a run."""
