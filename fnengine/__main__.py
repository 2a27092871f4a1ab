"""`python -m fnengine` is `fnengine`."""

import sys

from fnengine.cli import main

if __name__ == "__main__":
    sys.exit(main())
