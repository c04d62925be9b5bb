"""What does a model cost? Parameters, operations and bytes, counted from shapes alone."""
