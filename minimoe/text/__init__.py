"""How does text become batches? Corpora are read, tokenizers turn them into numbers, and batches are drawn from them."""
