"""What can a model do? Its loss on a text, a suite of small tasks, and intervals that say how certain a number is."""
