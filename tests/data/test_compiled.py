"""Compiled loops where numba may not cache, and at their limits."""

import subprocess
import sys

import numpy as np
import pytest

from onetrain.data.compiled import elementwise, loop
from onetrain.data.ragged import copy_ranges


def test_where_no_cache_can_be_written_loops_are_compiled_all_the_same():
    program = (
        "from numba.core import caching\n"
        "caching.CacheImpl._locator_classes = []\n"  # as in a container whose folders are read-only
        "import numpy as np\n"
        "from onetrain.data.buckets import gap_buckets\n"
        "from onetrain.data.permutation import permute\n"
        "assert sorted(permute(np.arange(9), 9, 1)) == list(range(9))\n"
        "assert gap_buckets(np.array([3000])).tolist() == [2]\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_other_mistakes_are_not_hidden():
    with pytest.raises(Exception, match="nonsense"):
        elementwise("uint8(nonsense)")(lambda value: value)
    with pytest.raises(Exception, match="undefined_name"):
        loop(lambda: undefined_name)()  # noqa: F821


@pytest.mark.parametrize("kind", [np.int16, np.int32, np.int64, np.float32])
def test_ranges_are_copied_and_what_lies_outside_is_refused(kind):
    rng = np.random.default_rng(0)
    sources = [rng.integers(0, 99, 30).astype(kind) for _ in range(3)]
    chosen, begin, length = rng.integers(0, 3, 20), rng.integers(0, 20, 20), rng.integers(0, 10, 20)
    at, out = np.cumsum(length) - length, np.empty(length.sum(), kind)
    base = np.array([source.__array_interface__["data"][0] for source in sources])[chosen]
    size = np.full(20, sources[0].nbytes)
    assert copy_ranges(base, size, begin, length, at, out)
    rows = zip(chosen, begin, length, strict=True)
    assert out.tolist() == np.concatenate([sources[c][b : b + n] for c, b, n in rows]).tolist()
    for wrong in (dict(begin=np.full(20, 25)), dict(begin=np.full(20, -1)), dict(length=np.full(20, -1))):
        changed = dict(begin=begin, length=np.full(20, 6)) | wrong
        assert not copy_ranges(base, size, changed["begin"], changed["length"], at, np.empty(200, kind))
