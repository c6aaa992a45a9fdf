"""`python -m kmem`: the `kmem` command."""

import sys

from kmem.cli import main

if __name__ == "__main__":
    sys.exit(main())
