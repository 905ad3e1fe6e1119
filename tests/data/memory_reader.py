"""Users in memory, behind the interface of the shard reader that samples and floors use."""

from types import SimpleNamespace

import numpy as np

from onetrain.data.item_table import ItemTable
from onetrain.data.shards import UserSequence
from onetrain.data.sids import SidMap

BEHAVIOURS = ("buy", "click", "view")
SCENARIOS = ("feed", "search")
EXTRA = ("price",)
ITEMS = 15
HOUR_MS = 3_600_000


MANIFEST = SimpleNamespace(
    behaviours=BEHAVIOURS, scenarios=SCENARIOS, extra=EXTRA, items=SimpleNamespace(rows=ITEMS), user_features={}
)


class MemoryReader:
    def __init__(self, users):
        self.users = users
        self.n_users = len(users)
        self.manifest = MANIFEST

    def user(self, row):
        return self.users[row]

    def split_bounds(self):
        columns = zip(*((len(user), user.valid_start, user.test_start) for user in self.users), strict=True)
        return tuple(np.array(column, dtype=np.int64) for column in columns)


def random_user(rng, name="u", longest=14):
    """Few hours and items, so that ties and repeats abound; any split bounds."""
    n = int(rng.integers(0, longest + 1))
    valid_start, test_start = np.sort(rng.integers(0, n + 1, 2)).tolist()
    durations = rng.choice([-1, 0, 1, 700, 1000, 2500, 9_999, 61_000, 10**9], n)
    watched = durations * rng.choice([0, 0.05, 0.1, 0.21, 0.4, 0.7, 1, 1.5, 30], n)
    prices = np.array([np.nan, 0, 0.4, 0.5, -0.5, 1, -1, 3, -7, 1e5, -1e30], dtype=np.float32)
    return UserSequence(
        user=name,
        item=rng.integers(0, ITEMS, n).astype(np.int32),
        timestamp_ms=np.sort(rng.integers(0, 12, n)) * 5 * HOUR_MS + 1_700_200_000_000,
        behaviour=rng.integers(0, 3, n).astype(np.int16),
        scenario=rng.integers(0, 2, n).astype(np.int16),
        watch_ms=np.where(rng.random(n) < 0.1, -1, watched).astype(np.int64),
        duration_ms=durations,
        extra={"price": rng.choice(prices, n)},
        valid_start=valid_start,
        test_start=test_start,
    )


def random_reader(seed, users=8, longest=14):
    rng = np.random.default_rng(seed)
    return MemoryReader([random_user(rng, f"u{number}", longest) for number in range(users)])


def random_sids(levels=3):
    rng = np.random.default_rng(5)
    return SidMap(rng.integers(0, 4, (ITEMS, levels)), (4,) * levels, (), "catalogue")


def random_items():
    """Training counts, some zero, and two categorical features."""
    rng = np.random.default_rng(6)
    return ItemTable(
        train_count_I=rng.integers(0, 9, ITEMS) * rng.integers(0, 2, ITEMS),
        features={"category": rng.integers(0, 5, ITEMS), "maker": rng.integers(0, 3, ITEMS)},
        sizes={"category": 5, "maker": 3},
    )
