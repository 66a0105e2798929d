"""`python -m tinylm`, also under `torchrun ... -m tinylm`."""

import sys

from tinylm.cli import main

if __name__ == "__main__":
    sys.exit(main())
