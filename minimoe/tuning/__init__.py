"""How does a model learn to obey? Instructions, preferences, and adapters that change few of its numbers."""
