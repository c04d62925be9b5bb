"""What does the command line offer? The commands and their options."""
