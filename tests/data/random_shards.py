"""Random users in small real shards, of a random layout; written once per process and removed when it ends."""

import atexit
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa

from onetrain.data import shard_writer
from onetrain.data.item_table import ItemTable
from onetrain.data.manifest import Manifest, StoredFile
from onetrain.data.schema import extra_column
from onetrain.data.shard_writer import ShardWriter, UserBlock, join_blocks
from onetrain.data.shards import ShardReader, UserSequence
from onetrain.data.sids import SidMap

BEHAVIOURS = ("buy", "click", "view")
SCENARIOS = ("feed", "search")
EXTRA = ("price",)
CITIES = ("Bonn", "Ulm")
ITEMS = 15
HOUR_MS = 3_600_000
_FOLDER = tempfile.TemporaryDirectory(prefix="onetrain-tests-")
atexit.register(_FOLDER.cleanup)
_numbers = count()


@dataclass(frozen=True)
class RandomData:
    """Users, and a reader of the folder that holds them."""

    users: list[UserSequence]
    reader: ShardReader
    folder: Path

    @property
    def manifest(self):
        return self.reader.manifest


def random_user(rng, name="u", longest=14, grown=False):
    """Few hours and items, so that ties and repeats abound; any split bounds. `grown`: training may begin late."""
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
        train_start=int(rng.integers(0, valid_start + 1)) if grown else 0,
        features={"city": int(rng.integers(0, 1 + len(CITIES)))},
    )


@lru_cache(maxsize=256)
def random_data(seed, users=8, longest=14, grown=False):
    """Users "u0", "u1" ... over shards and record batches of random sizes."""
    rng = np.random.default_rng(seed)
    made = [random_user(rng, f"u{number}", longest, grown) for number in range(users)]
    most = max(users * longest, 2)
    return store(made, shard_events=int(rng.integers(1, most)), batch_events=int(rng.integers(1, most)))


def random_reader(seed, users=8, longest=14):
    return random_data(seed, users, longest).reader


def store(users, shard_events=1000, batch_events=1000, folder=None):
    """Write these users, open their folder."""
    folder = Path(_FOLDER.name) / str(next(_numbers)) if folder is None else folder
    folder.mkdir(parents=True)
    with mock.patch.object(shard_writer, "BATCH_EVENTS", batch_events):
        writer = ShardWriter(folder, EXTRA, shard_events, ("city",))
    writer.append(join_blocks([block_of(user) for user in users]))
    writer.close()
    tables = writer.tables()
    manifest = Manifest(
        shards=tuple(writer.shards),
        items=StoredFile("items.arrow", ITEMS, 0, ""),
        user_table=tables[0],
        batch_table=tables[1],
        users=len(users),
        events=sum(map(len, users)),
        n_train_events=sum(user.valid_start - user.train_start for user in users),
        n_valid_events=sum(user.test_start - user.valid_start for user in users),
        n_test_events=sum(len(user) - user.test_start for user in users),
        behaviours=BEHAVIOURS,
        scenarios=SCENARIOS,
        extra=EXTRA,
        time_range_ms=(0, 1),
        split={"kind": "leave_one_out"},
        catalogue_fingerprint="catalogue",
        fingerprint=folder.name,
        user_features={"city": CITIES},
    )
    return RandomData(users, ShardReader(folder, manifest), folder)


def block_of(user):
    names = ("item", "timestamp_ms", "behaviour", "scenario", "watch_ms", "duration_ms")
    columns = {name: getattr(user, name) for name in names}
    columns |= {extra_column(name): values for name, values in user.extra.items()}
    bounds = (np.array([getattr(user, name)]) for name in ("train_start", "valid_start", "test_start"))
    features = {name: np.array([number]) for name, number in user.features.items()}
    return UserBlock(pa.array([user.user]), np.array([len(user)]), *bounds, columns, features)


MANIFEST = random_data(0).manifest  # what batches need of it is the same for all random data


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
