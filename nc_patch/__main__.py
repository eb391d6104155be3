"""``python -m nc_patch``: the command line."""

import sys

from nc_patch.cli import main

if __name__ == "__main__":
    sys.exit(main())
