"""Settings of all tests: no progress bars or notes; a command prints its result, or one line of error."""

import os

os.environ.setdefault("TQDM_DISABLE", "1")
