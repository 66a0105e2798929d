"""Settings of all tests: no progress bars and notes, so that what a command prints is its result or one line of error."""

import os

os.environ.setdefault("TQDM_DISABLE", "1")
