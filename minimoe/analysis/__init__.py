"""What do the experts do? The routing of any text: measured, drawn as a page, and shown in the text itself."""
