"""How does a model become smaller, or several become one? Weights are kept in 2 to 8 bits, models are merged, and a
dense model becomes a mixture. Every error is stated and tested."""
