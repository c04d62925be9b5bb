"""How do figures look? Colours, the parts that all figures share, the figures of a run, and those of the lessons."""
