"""Who does the work? One module for each kind of expert; ``moe.EXPERTS`` lists them."""
