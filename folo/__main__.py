"""`python -m folo` is `folo`."""

import sys

from folo.cli import main

if __name__ == "__main__":
    sys.exit(main())
