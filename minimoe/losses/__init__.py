"""What is minimised? The cross-entropy, the auxiliary losses that keep every expert in use, and the objective that adds
them up over the shards of a batch. Every loss is a function of sums over tokens."""
