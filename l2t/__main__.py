"""`python -m l2t`: the command `l2t`, where its script is not on the path."""

import sys

from l2t.cli import main

if __name__ == "__main__":
    sys.exit(main())
