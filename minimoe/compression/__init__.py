"""How does a model become smaller? Its weights are kept in 2 to 8 bits each, and the error is stated and tested."""
