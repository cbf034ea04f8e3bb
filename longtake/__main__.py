"""`python -m longtake`, and `torchrun -m longtake`."""

import sys

from longtake.cli import main

sys.exit(main())
