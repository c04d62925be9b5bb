"""How fast is this machine? The time of a step and of its parts, and what slows them down."""
