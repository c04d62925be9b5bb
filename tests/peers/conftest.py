"""The peers: PyTorch and transformers, to compare with. Nothing here is collected where they are not installed."""

import importlib.util

MISSING = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
collect_ignore_glob = ["test_*.py"] if MISSING else []
