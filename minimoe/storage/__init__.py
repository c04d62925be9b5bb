"""How are models saved and loaded? Runs on disk, their metrics, and folders in Hugging Face's layout."""
