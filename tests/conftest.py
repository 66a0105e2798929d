"""Settings of all tests: no progress bars or notes, only the result or one line of error."""

import os

os.environ.setdefault("TQDM_DISABLE", "1")
