"""Is every gradient right? Finite differences in float64, the cases that they check, and their results."""
