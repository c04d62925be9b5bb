"""Which expert does each token go to, and with what weight? One module for each router, listed in ``moe.ROUTERS``."""
