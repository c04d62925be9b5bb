"""What can be asked of minimoe in a terminal? The commands, and their options."""
