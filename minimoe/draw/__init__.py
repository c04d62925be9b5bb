"""How do figures look? Colours, the parts that figures share, the figures of a run and those of the lessons."""
