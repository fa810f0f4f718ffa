"""`python -m sharded_pc` is `sharded-pc`."""

import sys

from sharded_pc.cli import main

if __name__ == "__main__":
    sys.exit(main())
