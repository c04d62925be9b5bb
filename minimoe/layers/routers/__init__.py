"""Who goes where, and with what weight? One module for each router; ``moe.ROUTERS`` lists them."""
