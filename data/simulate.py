"""A simulated shop: raw logs whose next item can be predicted, and how well it can be predicted at best.

Items belong to a theme (themes to departments) and have a style; their embedding is the sum of a vector of each, plus
noise. A user has one style, a taste over themes that drifts from session to session, and no item twice. The next theme
is, with probability FOLLOW, the one that follows from the last theme and the department of the one before; else the
taste decides. Within the theme, the user's own style and Zipf popularity decide. So the last item alone says little:
the last two themes and the style of the whole history say much more.

Attributes that no event depends on: an item has one of its theme's makers, a user an age group that often, not always,
tells the style.

Files: events-*.parquet, items.parquet, users.parquet, and oracle.parquet with the true distribution of every user's
last event.

Legend: I items, K themes, M items of the largest theme, U users of one chunk, T events of the longest user.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from onetrain.data.errors import DataError
from onetrain.data.options import SimulatorOptions

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

BEHAVIOURS = ("view", "click", "like", "buy")
SCENARIOS = ("feed", "search", "related")
STYLES = ("plain", "bold", "vintage", "modern")
AGE_GROUPS = ("18-24", "25-34", "35-49", "50 and over")  # one for each style
AGE_TELLS = 0.7  # probability that a user's age group is the one of the style; else it is any
MAKERS = 3  # of each theme
DEPARTMENTS = 8
FOLLOW = 0.75  # probability that the next theme follows from the last two
OFF_STYLE = 0.04  # weight of an item of another style
ZIPF = 0.6  # exponent of popularity within a theme and style
DRIFT = 0.3  # share of the taste that a new session replaces
SESSION_END = 0.2
MIN_EVENTS = 3
ORACLE_ITEMS = 50
SEEN_CELLS_PER_CHUNK = 1 << 25  # users of one chunk times items: bounds memory
MAX_USERS_PER_CHUNK = 4096
START_MS = 1_735_689_600_000  # 2025-01-01
DAY_MS = 86_400_000


@dataclass(frozen=True)
class Shop:
    """What all users share."""

    theme: Ints  # (I,)
    style: Ints  # (I,)
    weight: Floats  # (I,) popularity within theme and style
    duration_ms: Ints  # (I,)
    department: Ints  # (K,)
    follows: Ints  # (department of the theme before, last theme) -> next theme
    members: Ints  # (K, M) items of each theme, -1 where a theme is smaller
    embedding: NDArray[np.float32]  # (I, D)
    maker: Ints  # (I,)


@dataclass(frozen=True)
class Chunk:
    """The events of some users, padded to (U, T), and their oracle."""

    first_user: int
    style: Ints  # (U,)
    length: Ints
    item: Ints  # (U, T)
    timestamp_ms: Ints
    behaviour: Ints
    scenario: Ints
    watch_ms: Ints
    oracle_item: Ints  # (U, top), most probable first
    oracle_probability: Floats  # (U, top)


def write_logs(options: SimulatorOptions, folder: str) -> None:
    """Write the logs of one shop into `folder`; equal options give equal logs. Logs already there are replaced.

    events-*.parquet: user, item, timestamp (epoch ms), behaviour, scenario, watch_ms, duration_ms; one file per chunk
    of users. items.parquet: id, text, categories, embedding, maker. users.parquet: id, age_group. oracle.parquet: see
    `read_oracle`. DataError for sizes that make no shop.
    """
    _check(options)
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    for old in target.glob("events-*.parquet"):
        old.unlink()
    shop = build_shop(options)
    pq.write_table(_items_table(shop), target / "items.parquet")
    with (
        pq.ParquetWriter(target / "oracle.parquet", _ORACLE_SCHEMA) as oracle,
        pq.ParquetWriter(target / "users.parquet", _USERS_SCHEMA) as users,
    ):
        for number, chunk in enumerate(simulate_users(shop, options)):
            pq.write_table(_events_table(shop, chunk), target / f"events-{number:05d}.parquet")
            oracle.write_table(_oracle_table(chunk, shop))
            users.write_table(_users_table(chunk, options))


def read_oracle(folder: str) -> pa.Table:
    """The true distribution of every user's last event, given all that came before and the user's hidden state.

    Columns: user (string), items (list<string>, the 50 most probable, best first), probabilities (list<double>; what
    is missing to 1 lies on further items). The mean of the first k probabilities' sum is the Recall@k that no model
    can beat on the last events but by chance.
    """
    path = Path(folder) / "oracle.parquet"
    if not path.exists():
        raise DataError(f"no simulator's oracle in {folder}: oracle.parquet is missing; write the logs again")
    return pq.read_table(path)


def build_shop(options: SimulatorOptions) -> Shop:
    """Themes, items and their embeddings."""
    rng = np.random.default_rng([options.seed, 0])
    n_items, n_themes, dim = options.items, options.themes, options.embedding_dim
    # every theme and style gets equally many items, up to one; ids are shuffled so that they tell nothing
    slot = rng.permutation(n_items)
    theme, style = slot % n_themes, slot // n_themes % len(STYLES)
    weight = np.power(1.0 + slot // (n_themes * len(STYLES)), -ZIPF)
    department = rng.permutation(np.arange(n_themes) % DEPARTMENTS)
    members = np.full((n_themes, -(-n_items // n_themes)), -1)
    for number in range(n_themes):
        of_theme = np.flatnonzero(theme == number)
        members[number, : len(of_theme)] = of_theme
    embedding = (
        1.5 * rng.normal(size=(DEPARTMENTS, dim))[department[theme]]
        + 2.0 * rng.normal(size=(n_themes, dim))[theme]
        + 1.0 * rng.normal(size=(len(STYLES), dim))[style]
        + 0.4 * rng.normal(size=(n_items, dim))
    )
    return Shop(
        theme=theme,
        style=style,
        weight=weight,
        duration_ms=np.exp(rng.normal(10.0, 0.6, n_items)).astype(np.int64),
        department=department,
        follows=_follows(rng, n_themes),
        members=members,
        embedding=embedding.astype(np.float32),
        maker=theme * MAKERS + np.random.default_rng([options.seed, 2]).integers(MAKERS, size=n_items),
    )


def simulate_users(shop: Shop, options: SimulatorOptions) -> Iterator[Chunk]:
    """All users, in chunks that bound memory."""
    per_chunk = max(1, min(MAX_USERS_PER_CHUNK, SEEN_CELLS_PER_CHUNK // options.items))
    for first in range(0, options.users, per_chunk):
        rng = np.random.default_rng([options.seed, 1, first])
        yield _simulate_chunk(shop, options, first, min(per_chunk, options.users - first), rng)


def _simulate_chunk(shop: Shop, options: SimulatorOptions, first: int, users: int, rng: np.random.Generator) -> Chunk:
    n_items, n_themes = options.items, options.themes
    length = MIN_EVENTS + rng.gamma(2.0, (options.events_per_user - MIN_EVENTS) / 2, users).round().astype(np.int64)
    length = np.minimum(length, n_items // 2)
    steps = int(length.max())
    style = rng.integers(len(STYLES), size=users)
    taste_UK = _tastes(rng, users, n_themes)
    seen_UI = np.zeros((users, n_items), bool)
    unseen_UK = np.tile(np.bincount(shop.theme, minlength=n_themes), (users, 1))
    last = rng.integers(n_themes, size=users)
    before = rng.integers(n_themes, size=users)
    item, gap_ms, followed = (np.zeros((users, steps), np.int64) for _ in range(3))
    top = min(ORACLE_ITEMS, n_items)
    oracle_item, oracle_probability = np.zeros((users, top), np.int64), np.zeros((users, top))

    for step in range(steps):
        live = np.flatnonzero(length > step)
        new_session = rng.random(len(live)) < SESSION_END
        drifting = live[new_session]
        taste_UK[drifting] = (1 - DRIFT) * taste_UK[drifting] + DRIFT * _tastes(rng, len(drifting), n_themes)
        gap_ms[live, step] = np.where(
            new_session, rng.exponential(1.5 * DAY_MS, len(live)), rng.exponential(90_000, len(live)) + 1000
        )
        followed_theme = shop.follows[shop.department[before[live]], last[live]]
        theme_UK = _theme_probability(shop, taste_UK[live], followed_theme, unseen_UK[live])
        ending = np.flatnonzero(length[live] == step + 1)
        done = live[ending]
        oracle_item[done], oracle_probability[done] = _oracle(shop, theme_UK[ending], style[done], seen_UI[done], top)
        theme = _draw(rng, theme_UK)
        within_UM = _within_theme(shop, theme, style[live], seen_UI, live)
        chosen = shop.members[theme, _draw(rng, within_UM)]
        item[live, step], seen_UI[live, chosen] = chosen, True
        unseen_UK[live, theme] -= 1
        followed[live, step] = theme == followed_theme
        before[live], last[live] = last[live], theme

    behaviour = _choose(rng, np.where((shop.style[item] == style[:, None])[..., None], _LIKED, _PASSED))
    scenario = _choose(rng, np.where(followed[..., None] > 0, _LED, _SOUGHT))
    share_watched = np.minimum(1.0, rng.beta(2.0, 2.0, item.shape) * (0.5 + 0.4 * behaviour))
    return Chunk(
        first_user=first,
        style=style,
        length=length,
        item=item,
        timestamp_ms=START_MS + rng.integers(60 * DAY_MS, size=(users, 1)) + np.cumsum(gap_ms, axis=1),
        behaviour=behaviour,
        scenario=scenario,
        watch_ms=(share_watched * shop.duration_ms[item]).astype(np.int64),
        oracle_item=oracle_item,
        oracle_probability=oracle_probability,
    )


# shares of BEHAVIOURS for items of the user's own style and of others, of SCENARIOS for led and for sought themes
_LIKED, _PASSED = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.7, 0.24, 0.05, 0.01])
_LED, _SOUGHT = np.array([0.6, 0.15, 0.25]), np.array([0.4, 0.5, 0.1])


def _theme_probability(shop: Shop, taste_UK: Floats, followed: Ints, unseen_UK: Ints) -> Floats:
    """(U, K): FOLLOW on the theme that follows, the rest by taste; themes without an unseen item drop out."""
    theme_UK = (1 - FOLLOW) * taste_UK
    theme_UK[np.arange(len(followed)), followed] += FOLLOW
    theme_UK *= unseen_UK > 0
    return theme_UK / theme_UK.sum(axis=1, keepdims=True)


def _within_theme(shop: Shop, theme: Ints, style: Ints, seen_UI: NDArray[np.bool_], live: Ints) -> Floats:
    """(U, M): each live user's probability of each member of the theme, by style and popularity among the unseen."""
    member_UM = shop.members[theme]
    weight_UM = shop.weight[member_UM] * np.where(shop.style[member_UM] == style[:, None], 1.0, OFF_STYLE)
    weight_UM *= (member_UM >= 0) & ~seen_UI[live[:, None], member_UM]
    return weight_UM / weight_UM.sum(axis=1, keepdims=True)


def _oracle(shop: Shop, theme_UK: Floats, style: Ints, seen_UI: NDArray[np.bool_], top: int) -> tuple[Ints, Floats]:
    """The `top` most probable next items of each user and their probabilities (U, top)."""
    weight_UI = shop.weight * np.where(shop.style == style[:, None], 1.0, OFF_STYLE) * ~seen_UI
    total_UK = weight_UI @ np.eye(len(shop.department))[shop.theme]
    per_weight_UK = np.divide(theme_UK, total_UK, out=np.zeros_like(theme_UK), where=total_UK > 0)
    probability_UI = weight_UI * per_weight_UK[:, shop.theme]
    best = np.argsort(-probability_UI, axis=1, kind="stable")[:, :top]
    return best, np.take_along_axis(probability_UI, best, axis=1)


def _tastes(rng: np.random.Generator, users: int, themes: int) -> Floats:
    return rng.dirichlet(np.full(themes, 0.2), users)


def _draw(rng: np.random.Generator, probability_UN: Floats) -> Ints:
    """One column per row, by the row's probabilities."""
    ladder = np.cumsum(probability_UN, axis=1)
    # scaled by the last rung, so that rounding never draws past the last column of positive probability
    return (ladder <= rng.random((len(ladder), 1)) * ladder[:, -1:]).sum(axis=1)


def _choose(rng: np.random.Generator, share_UTN: Floats) -> Ints:
    return (np.cumsum(share_UTN, axis=-1)[..., :-1] <= rng.random(share_UTN.shape[:-1])[..., None]).sum(axis=-1)


def _follows(rng: np.random.Generator, themes: int) -> Ints:
    """(DEPARTMENTS, K): each row leads to every theme once; no two rows lead from one theme to the same."""
    circle = rng.permutation(themes)
    follows = np.empty((DEPARTMENTS, themes), np.int64)
    for department, steps in enumerate(rng.permutation(np.arange(1, themes))[:DEPARTMENTS]):
        follows[department, circle] = np.roll(circle, -steps)
    return follows


_USERS_SCHEMA = pa.schema({"id": pa.string(), "age_group": pa.string()})
_ORACLE_SCHEMA = pa.schema(
    {"user": pa.string(), "items": pa.list_(pa.string()), "probabilities": pa.list_(pa.float64())}
)


def _user_ids(chunk: Chunk) -> NDArray[np.str_]:
    return np.array([f"u{number:07d}" for number in range(chunk.first_user, chunk.first_user + len(chunk.length))])


def _item_ids(shop: Shop) -> NDArray[np.str_]:
    return np.array([f"i{number:06d}" for number in range(len(shop.theme))])


def _items_table(shop: Shop) -> pa.Table:
    text = [
        f"{STYLES[style]} article of theme {theme}, department {shop.department[theme]}"
        for theme, style in zip(shop.theme, shop.style, strict=True)
    ]
    categories = [[f"department {shop.department[theme]}", f"theme {theme}"] for theme in shop.theme]
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(shop.embedding.ravel()), shop.embedding.shape[1])
    maker = [f"maker {number}" for number in shop.maker]
    columns = {"id": _item_ids(shop), "text": text, "categories": categories, "embedding": embedding, "maker": maker}
    return pa.table(columns)


def _users_table(chunk: Chunk, options: SimulatorOptions) -> pa.Table:
    # a stream of its own, so that events do not depend on attributes
    rng = np.random.default_rng([options.seed, 3, chunk.first_user])
    users = len(chunk.length)
    group = np.where(rng.random(users) < AGE_TELLS, chunk.style, rng.integers(len(AGE_GROUPS), size=users))
    return pa.table({"id": _user_ids(chunk), "age_group": np.array(AGE_GROUPS)[group]}, schema=_USERS_SCHEMA)


def _events_table(shop: Shop, chunk: Chunk) -> pa.Table:
    real = np.arange(chunk.item.shape[1]) < chunk.length[:, None]
    item = chunk.item[real]
    return pa.table(
        {
            "user": np.repeat(_user_ids(chunk), chunk.length),
            "item": _item_ids(shop)[item],
            "timestamp": chunk.timestamp_ms[real],
            "behaviour": np.array(BEHAVIOURS)[chunk.behaviour[real]],
            "scenario": np.array(SCENARIOS)[chunk.scenario[real]],
            "watch_ms": chunk.watch_ms[real],
            "duration_ms": shop.duration_ms[item],
        }
    )


def _oracle_table(chunk: Chunk, shop: Shop) -> pa.Table:
    columns = {
        "user": _user_ids(chunk).tolist(),
        "items": _item_ids(shop)[chunk.oracle_item].tolist(),
        "probabilities": chunk.oracle_probability.tolist(),
    }
    return pa.table(columns, schema=_ORACLE_SCHEMA)


def _check(options: SimulatorOptions) -> None:
    where = "data.source.simulator"
    if options.users < 1:
        raise DataError(f"{where}.users is {options.users}; a shop needs at least one user")
    if options.themes <= DEPARTMENTS:
        raise DataError(f"{where}.themes is {options.themes}; a shop needs at least {DEPARTMENTS + 1}")
    fewest = options.themes * len(STYLES)
    if options.items < fewest:
        raise DataError(
            f"{where}.items is {options.items}; {options.themes} themes of {len(STYLES)} styles need at least {fewest}"
        )
    if not MIN_EVENTS < options.events_per_user <= options.items / 4:
        raise DataError(
            f"{where}.events_per_user is {options.events_per_user}; it is more than {MIN_EVENTS} and at most a quarter "
            f"of {options.items} items, because a user takes no item twice"
        )
    if options.embedding_dim < 1:
        raise DataError(f"{where}.embedding_dim is {options.embedding_dim}; it is at least 1")
