"""How does a model write? Reading a prompt, the key/value cache, sampling, and a faster decoder for a single token."""
