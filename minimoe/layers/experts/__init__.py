"""What does an expert compute? One module for each kind of expert; ``moe.EXPERTS`` lists them."""
