"""How does a gradient change the parameters? AdamW, Muon, gradient clipping, and the schedule of the learning rate."""
