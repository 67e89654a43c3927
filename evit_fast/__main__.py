"""`python -m evit_fast` is the `evit-fast` command."""

import sys

from evit_fast.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
