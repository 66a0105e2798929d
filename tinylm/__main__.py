"""`python -m tinylm`, also under `torchrun ... -m tinylm`."""

import os
import sys

from tinylm.cli import main

if __name__ == "__main__":
    code = main()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # A process of torchrun leaves without taking the interpreter down: threads of the
        # communication library that are still running then abort it now and then, after
        # everything has been written.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
