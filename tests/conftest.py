"""One thread per process before torch is imported: tests with several ranks share few cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
