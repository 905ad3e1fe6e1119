"""Users in memory, behind the interface of the shard reader that samples and floors use."""

from types import SimpleNamespace

import numpy as np

from onetrain.data.shards import UserSequence
from onetrain.data.sids import SidMap

BEHAVIOURS = ("buy", "click", "view")
ITEMS = 15
HOUR_MS = 3_600_000


class MemoryReader:
    def __init__(self, users):
        self.users = users
        self.n_users = len(users)
        self.manifest = SimpleNamespace(behaviours=BEHAVIOURS)

    def user(self, row):
        return self.users[row]

    def split_bounds(self):
        columns = zip(*((len(user), user.valid_start, user.test_start) for user in self.users), strict=True)
        return tuple(np.array(column, dtype=np.int64) for column in columns)


def random_user(rng, name="u", longest=14):
    """Few hours and items, so that ties and repeats abound; any split bounds."""
    n = int(rng.integers(0, longest + 1))
    valid_start, test_start = np.sort(rng.integers(0, n + 1, 2)).tolist()
    return UserSequence(
        user=name,
        item=rng.integers(0, ITEMS, n).astype(np.int32),
        timestamp_ms=np.sort(rng.integers(0, 12, n)) * 5 * HOUR_MS + 1_700_000_000_000,
        behaviour=rng.integers(0, 3, n).astype(np.int16),
        scenario=rng.integers(0, 2, n).astype(np.int16),
        watch_ms=np.full(n, -1),
        duration_ms=np.full(n, -1),
        extra={},
        valid_start=valid_start,
        test_start=test_start,
    )


def random_reader(seed, users=8, longest=14):
    rng = np.random.default_rng(seed)
    return MemoryReader([random_user(rng, f"u{number}", longest) for number in range(users)])


def random_sids(levels=3):
    rng = np.random.default_rng(5)
    return SidMap(rng.integers(0, 4, (ITEMS, levels)), (4,) * levels, (), "catalogue")
