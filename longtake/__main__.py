"""`python -m longtake`, and `torchrun -m longtake`."""

import sys

from longtake.cli import main

if __name__ == "__main__":
    sys.exit(main())
