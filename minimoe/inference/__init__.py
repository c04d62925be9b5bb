"""How does a model write? Reading a prompt, a key/value cache, sampling, and a fast form of the decoder for one token."""
