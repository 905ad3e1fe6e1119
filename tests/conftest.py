"""One thread per process before torch is imported: tests with several ranks share few cores."""

import os
import signal

from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("onetrain", deadline=None, derandomize=True)  # the same on a busy machine, and every time
settings.load_profile("onetrain")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a background job; what tests start must know Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
