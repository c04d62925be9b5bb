"""How are models kept, and how do they travel? Runs on disk, their metrics, and folders in the layout of Hugging Face."""
