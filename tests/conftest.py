"""One thread per process before torch is imported: tests with several ranks share few cores."""

import os

from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("onetrain", deadline=None, derandomize=True)  # the same on a busy machine, and every time
settings.load_profile("onetrain")
