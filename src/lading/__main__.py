"""Run the command line as ``python -m lading``."""

import sys

from lading.cli import main

if __name__ == "__main__":
    sys.exit(main())
