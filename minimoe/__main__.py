"""``python -m minimoe`` is ``minimoe``."""

import sys

from minimoe.cli import main

if __name__ == "__main__":
    sys.exit(main())
