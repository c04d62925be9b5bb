"""Who computes what? The workers of a step, as processes or threads, what they add up, and the rows that they exchange
where each owns some of the experts."""
