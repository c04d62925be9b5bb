"""How does text become batches? A corpus is read, a tokenizer turns it into ids, and batches are drawn from the ids."""
