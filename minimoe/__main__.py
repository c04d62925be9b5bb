"""``python -m minimoe`` is ``minimoe``."""

import sys

from minimoe.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
