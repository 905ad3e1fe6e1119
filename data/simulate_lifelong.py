"""Simulated lifelong users: histories of thousands of events in which a few, long ago, decide what is taken now.

An item is one of a theme and a variant. Nearly all events are noise: themes follow a Markov chain (stay, go on along a
circle, or jump), the variant is drawn anew every time, the behaviour is view or click. Each user has one favourite
variant of every theme. Nothing but a single `buy` of that theme reveals it, `min_distance` to `max_distance` events
before the user's only request. At the request the user takes the favourites of several themes at one timestamp
(behaviour `rebuy`).

So with batch.request_by timestamp and batch.target_behaviours [rebuy] one history has many targets. The first code of
a target (its theme) cannot be known, or follows from the latest events (`themes_of: recent`); given the theme, the
second code (its variant) is known to whoever remembers the `buy`, and a guess among `variants` to everybody else.

Requests of training users lie before VALID_FROM_MS, those of validation users before TEST_FROM_MS, those of test users
after it: `data.split.kind: global_time` with these two points keeps the users apart.

Files: events-*.parquet, items.parquet, users.parquet, and truth.parquet with the deciding events.

Legend: U users of one chunk, T events of the longest history, K themes, R rebuys.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from onetrain.data.errors import DataError
from onetrain.data.options import LifelongOptions

Ints = NDArray[np.int64]

BEHAVIOURS = ("view", "click", "buy", "rebuy")
VIEW, CLICK, BUY, REBUY = range(4)
STAY, FOLLOW = 0.45, 0.35  # of the theme: the same again, the next of the circle; else any
CLICKS = 0.3  # share of the noise
CLEARANCE = 64  # events between a deciding event and the oldest event of a history, at least
USERS_PER_CHUNK = 256
DAY_MS = 86_400_000
VALID_FROM_MS = 1_735_689_600_000  # 2025-01-01: requests of validation users from here on,
TEST_FROM_MS = VALID_FROM_MS + 30 * DAY_MS  # of test users from here on
MEAN_GAP_MS = 1_800_000


@dataclass(frozen=True)
class Chunk:
    """The events of some users, padded in front to (U, T), and what they take at their request."""

    first_user: int
    length: Ints  # (U,)
    theme: Ints  # (U, T); the newest event stands last
    variant: Ints
    behaviour: Ints
    timestamp_ms: Ints
    request_ms: Ints  # (U,)
    favourite: Ints  # (U, K) variant of every theme
    distance: Ints  # (U, K) events from the deciding event to the request: 1 is the newest event
    rebought: Ints  # (U, R) themes


def write_logs(options: LifelongOptions, folder: str) -> None:
    """Write the logs into `folder`; equal options give equal logs. Logs already there are replaced.

    events-*.parquet: user, item, timestamp (epoch ms), behaviour; one file per chunk of users. items.parquet: id, text,
    categories, embedding. users.parquet: id. truth.parquet: see `read_truth`. DataError for options that fit no user.
    """
    check(options)
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    for old in target.glob("events-*.parquet"):
        old.unlink()
    pq.write_table(_items_table(options), target / "items.parquet")
    with (
        pq.ParquetWriter(target / "users.parquet", _USERS_SCHEMA) as users,
        pq.ParquetWriter(target / "truth.parquet", _TRUTH_SCHEMA) as truth,
    ):
        for number, chunk in enumerate(simulate_users(options)):
            pq.write_table(_events_table(chunk, options), target / f"events-{number:05d}.parquet")
            users.write_table(pa.table({"id": _user_ids(chunk)}, schema=_USERS_SCHEMA))
            truth.write_table(_truth_table(chunk))


def read_truth(folder: str) -> pa.Table:
    """Where every user's favourites were revealed: user, theme, variant, distance (events before the request)."""
    path = Path(folder) / "truth.parquet"
    if not path.exists():
        raise DataError(
            f"no truth of simulated lifelong users in {folder}: truth.parquet is missing; write the logs again"
        )
    return pq.read_table(path)


def item_id(theme: int, variant: int) -> str:
    """Of the one item of a theme and a variant."""
    return f"t{theme:03d}v{variant:03d}"


def simulate_users(options: LifelongOptions) -> Iterator[Chunk]:
    """All users, training users first, then those of validation and test, in chunks that bound memory."""
    for first in range(0, options.users, USERS_PER_CHUNK):
        rng = np.random.default_rng([options.seed, 1, first])
        yield _simulate_chunk(options, first, min(USERS_PER_CHUNK, options.users - first), rng)


def _simulate_chunk(options: LifelongOptions, first: int, users: int, rng: np.random.Generator) -> Chunk:
    length = np.exp(rng.uniform(np.log(options.min_events), np.log(options.max_events), users)).round().astype(np.int64)
    steps = int(length.max())
    theme_UT = _themes(rng, users, steps, options.themes)
    variant_UT = rng.integers(options.variants, size=(users, steps))
    behaviour_UT = np.where(rng.random((users, steps)) < CLICKS, CLICK, VIEW)
    favourite_UK = rng.integers(options.variants, size=(users, options.themes))
    furthest = np.minimum(length - min(CLEARANCE, options.min_events // 8), options.max_distance)
    distance_UK = _distances(rng, options.themes, options.min_distance, furthest)
    row = np.arange(users)[:, None]
    theme_UT[row, steps - distance_UK] = np.arange(options.themes)
    variant_UT[row, steps - distance_UK] = favourite_UK
    behaviour_UT[row, steps - distance_UK] = BUY
    gap_UT = rng.exponential(MEAN_GAP_MS, (users, steps)).astype(np.int64) + 1000
    request_ms = _requests(rng, np.arange(first, first + users), options)
    before_UT = np.cumsum(gap_UT[:, ::-1], axis=1)[:, ::-1]
    return Chunk(
        first_user=first,
        length=length,
        theme=theme_UT,
        variant=variant_UT,
        behaviour=behaviour_UT,
        timestamp_ms=request_ms[:, None] - before_UT,
        request_ms=request_ms,
        favourite=favourite_UK,
        distance=distance_UK,
        rebought=_rebought(rng, theme_UT, options),
    )


def _themes(rng: np.random.Generator, users: int, steps: int, themes: int) -> Ints:
    """(U, T): a Markov chain on a circle of themes, from one jump to the next a running sum of steps of 0 or 1."""
    kind_UT = rng.random((users, steps))
    jumps_UT = kind_UT >= STAY + FOLLOW
    jumps_UT[:, 0] = True
    moved_UT = np.cumsum((kind_UT >= STAY) & ~jumps_UT, axis=1)
    landing_UT = rng.integers(themes, size=(users, steps)) - moved_UT  # where the circle stood, had it never moved
    latest_UT = np.maximum.accumulate(np.where(jumps_UT, np.arange(steps), 0), axis=1)
    return (np.take_along_axis(landing_UT, latest_UT, axis=1) + moved_UT) % themes


def _distances(rng: np.random.Generator, themes: int, nearest: int, furthest: Ints) -> Ints:
    """(U, K) distinct whole numbers in [nearest, furthest] of each user, in any order."""
    room_U1 = (furthest - nearest + 1 - (themes - 1))[:, None]
    drawn_UK = np.sort((rng.random((len(furthest), themes)) * room_U1).astype(np.int64), axis=1)
    return rng.permuted(nearest + drawn_UK + np.arange(themes), axis=1)


def _rebought(rng: np.random.Generator, theme_UT: Ints, options: LifelongOptions) -> Ints:
    """(U, R) themes: any, or those that were seen last; distinct."""
    users = len(theme_UT)
    if options.themes_of == "any":
        return np.argsort(rng.random((users, options.themes)), axis=1)[:, : options.rebuys]
    steps = theme_UT.shape[1]
    last_UK = np.full((users, options.themes), -1)
    np.maximum.at(last_UK, (np.arange(users)[:, None], theme_UT), np.broadcast_to(np.arange(steps), theme_UT.shape))
    return np.argsort(-last_UK, axis=1, kind="stable")[:, : options.rebuys]


def _requests(rng: np.random.Generator, user: Ints, options: LifelongOptions) -> Ints:
    """(U,) epoch ms: before VALID_FROM_MS, from there on, from TEST_FROM_MS on."""
    held_out = options.held_out_users
    period_start = np.where(user < options.users - held_out, VALID_FROM_MS, TEST_FROM_MS)
    start = np.where(user < options.users - 2 * held_out, VALID_FROM_MS - 30 * DAY_MS, period_start)
    return start + rng.integers(30 * DAY_MS, size=len(user))


def check(options: LifelongOptions) -> None:
    """Raises DataError for options that fit no user."""
    where = "data.source.lifelong"
    least = {"users": 1, "themes": 2, "variants": 2, "min_distance": 1, "item_dim": 1, "held_out_users": 0}
    for name, value in least.items():
        if getattr(options, name) < value:
            raise DataError(f"{where}.{name} is {getattr(options, name)}; it is at least {value}.")
    if options.users < 2 * options.held_out_users + 1:
        raise DataError(
            f"{where}: {options.users} users leave none to train on beside {options.held_out_users} held out for "
            "validation and as many for test. Raise users or lower held_out_users."
        )
    if not 1 <= options.rebuys <= options.themes:
        raise DataError(f"{where}.rebuys is {options.rebuys}; it is between 1 and themes ({options.themes}).")
    if options.item_dim < options.themes + options.variants:
        raise DataError(
            f"{where}.item_dim is {options.item_dim}; it is at least themes + variants "
            f"({options.themes + options.variants}), so that every theme and every variant has a direction of its own."
        )
    room = min(options.min_events - min(CLEARANCE, options.min_events // 8), options.max_distance)
    if options.max_events < options.min_events or room < options.min_distance + options.themes - 1:
        raise DataError(
            f"{where}: histories of {options.min_events} to {options.max_events} events cannot hold {options.themes} "
            f"deciding events at {options.min_distance} to {options.max_distance} events before the request. Raise "
            "min_events and max_distance, or lower min_distance."
        )


_USERS_SCHEMA = pa.schema({"id": pa.string()})
_TRUTH_SCHEMA = pa.schema({"user": pa.string(), "theme": pa.int64(), "variant": pa.int64(), "distance": pa.int64()})


def _user_ids(chunk: Chunk) -> NDArray[np.str_]:
    return np.array([f"u{number:07d}" for number in range(chunk.first_user, chunk.first_user + len(chunk.length))])


def _item_ids(options: LifelongOptions) -> NDArray[np.str_]:
    return np.array(
        [item_id(number // options.variants, number % options.variants) for number in range(_count(options))]
    )


def _count(options: LifelongOptions) -> int:
    return options.themes * options.variants


def _items_table(options: LifelongOptions) -> pa.Table:
    """Every theme and every variant is a direction of its own, themes the longer ones: residual K-means finds them."""
    rng = np.random.default_rng([options.seed, 0])
    directions = np.linalg.qr(rng.normal(size=(options.item_dim, options.themes + options.variants)))[0].T
    theme, variant = np.divmod(np.arange(_count(options)), options.variants)
    embedding = 4.0 * directions[theme] + directions[options.themes + variant]
    flat = pa.array(embedding.astype(np.float32).ravel())
    return pa.table(
        {
            "id": _item_ids(options),
            "text": [f"variant {v} of theme {t}" for t, v in zip(theme, variant, strict=True)],
            "categories": [[f"theme {t}"] for t in theme],
            "embedding": pa.FixedSizeListArray.from_arrays(flat, options.item_dim),
        }
    )


def _events_table(chunk: Chunk, options: LifelongOptions) -> pa.Table:
    """History and request, user after user."""
    users, rebuys = chunk.rebought.shape
    steps = chunk.theme.shape[1]
    variant_UR = np.take_along_axis(chunk.favourite, chunk.rebought, axis=1)
    real = np.arange(steps + rebuys) >= (steps - chunk.length)[:, None]

    def joined(history_UT: Ints, request_UR: Ints) -> Ints:
        return np.concatenate((history_UT, np.broadcast_to(request_UR, (users, rebuys))), axis=1)[real]

    item = joined(chunk.theme * options.variants + chunk.variant, chunk.rebought * options.variants + variant_UR)
    behaviour = joined(chunk.behaviour, np.full((users, rebuys), REBUY))
    length = chunk.length + rebuys
    return pa.table(
        {
            "user": _dictionary(np.repeat(np.arange(users), length), _user_ids(chunk)),
            "item": _dictionary(item, _item_ids(options)),
            "timestamp": joined(chunk.timestamp_ms, chunk.request_ms[:, None]),
            "behaviour": _dictionary(behaviour, np.array(BEHAVIOURS)),
        }
    )


def _dictionary(index: Ints, values: NDArray[np.str_]) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(index.astype(np.int32)), pa.array(values)).cast(pa.string())


def _truth_table(chunk: Chunk) -> pa.Table:
    users, themes = chunk.favourite.shape
    columns = {
        "user": np.repeat(_user_ids(chunk), themes),
        "theme": np.tile(np.arange(themes), users),
        "variant": chunk.favourite.ravel(),
        "distance": chunk.distance.ravel(),
    }
    return pa.table(columns, schema=_TRUTH_SCHEMA)
