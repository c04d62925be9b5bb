"""Which step follows from a gradient? AdamW, Muon, gradient clipping, and the schedule of the learning rate."""
