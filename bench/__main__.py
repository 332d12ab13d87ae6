"""`python -m idemq.bench` is `idemq bench`."""

import sys

from .command import main

sys.exit(main(sys.argv[1:]))
