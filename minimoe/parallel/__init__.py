"""How do several workers share a step? The workers (processes or threads), the sums that they form together, and the
rows that they exchange if each of them owns some of the experts."""
