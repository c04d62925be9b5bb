"""``python -m minimoe`` does the same as the command ``minimoe``."""

import sys

from minimoe.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
