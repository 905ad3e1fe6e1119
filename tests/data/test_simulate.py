import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from onetrain.data import simulate
from onetrain.data.errors import DataError
from onetrain.data.options import SimulatorOptions

SMALL = SimulatorOptions(users=60, items=150, events_per_user=8, themes=12, embedding_dim=6, seed=3)


def read_events(folder):
    return pa.concat_tables(pq.read_table(path) for path in sorted(Path(folder).glob("events-*.parquet")))


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).iterdir()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Logs of the default shop."""
    path = tmp_path_factory.mktemp("shop")
    simulate.write_logs(SimulatorOptions(), path)
    return path


@pytest.fixture(scope="module")
def sequences(folder):
    """Item numbers of every user, oldest first, in the oracle's order of users."""
    events = read_events(folder)
    user, start = np.unique(np.array(events["user"].to_pylist()), return_index=True)
    assert user.tolist() == simulate.read_oracle(folder)["user"].to_pylist()
    assert all((np.diff(times) > 0).all() for times in np.split(events["timestamp"].to_numpy(), start[1:]))
    items = np.array([int(item[1:]) for item in events["item"].to_pylist()])
    return np.split(items, start[1:])


@pytest.fixture(scope="module")
def oracle(folder):
    """Item numbers and probabilities, both (users, 50)."""
    table = simulate.read_oracle(folder)
    items = np.array([[int(item[1:]) for item in row] for row in table["items"].to_pylist()])
    return items, np.array(table["probabilities"].to_pylist())


def test_equal_options_give_equal_bytes(tmp_path):
    simulate.write_logs(SMALL, tmp_path / "a")
    simulate.write_logs(SMALL, tmp_path / "b")
    simulate.write_logs(SimulatorOptions(**(vars(SMALL) | {"seed": 4})), tmp_path / "c")
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert digests(tmp_path / "a") != digests(tmp_path / "c")


def test_users_come_in_chunks_and_older_logs_go(tmp_path, monkeypatch):
    monkeypatch.setattr(simulate, "SEEN_CELLS_PER_CHUNK", 25 * SMALL.items)
    simulate.write_logs(SMALL, tmp_path)
    assert len(list(tmp_path.glob("events-*.parquet"))) == 3
    assert len(set(read_events(tmp_path)["user"].to_pylist())) == 60
    assert simulate.read_oracle(tmp_path).num_rows == 60
    monkeypatch.undo()
    simulate.write_logs(SMALL, tmp_path)
    assert len(list(tmp_path.glob("events-*.parquet"))) == 1


def test_what_the_logs_hold(folder):
    options = SimulatorOptions()
    events, items = read_events(folder), pq.read_table(folder / "items.parquet")
    assert events.column_names == ["user", "item", "timestamp", "behaviour", "scenario", "watch_ms", "duration_ms"]
    assert set(events["behaviour"].to_pylist()) == set(simulate.BEHAVIOURS)
    assert set(events["scenario"].to_pylist()) == set(simulate.SCENARIOS)
    assert events.num_rows / options.users == pytest.approx(options.events_per_user, rel=0.05)
    assert events.group_by(["user", "item"]).aggregate([]).num_rows == events.num_rows
    assert pc.all(pc.less_equal(events["watch_ms"], events["duration_ms"])).as_py()
    assert pc.min(events["watch_ms"]).as_py() >= 0
    assert items.column_names == ["id", "text", "categories", "embedding", "maker"]
    assert items.schema.field("embedding").type == pa.list_(pa.float32(), options.embedding_dim)
    assert set(events["item"].to_pylist()) <= set(items["id"].to_pylist())
    assert len(set(items["id"].to_pylist())) == options.items


def test_attributes_belong_to_themes_and_styles(folder):
    shop = simulate.build_shop(SimulatorOptions())
    makers = pq.read_table(folder / "items.parquet")["maker"].to_pylist()
    themes = {}
    for maker, theme in zip(makers, shop.theme.tolist(), strict=True):
        themes.setdefault(maker, set()).add(theme)
    assert all(len(of_maker) == 1 for of_maker in themes.values())
    assert len(themes) == simulate.MAKERS * SimulatorOptions().themes
    chunk = next(simulate.simulate_users(shop, SimulatorOptions(users=800)))
    users = pq.read_table(folder / "users.parquet")
    assert users.column_names == ["id", "age_group"]
    assert users["id"].to_pylist() == simulate.read_oracle(folder)["user"].to_pylist()
    small = simulate._users_table(chunk, SimulatorOptions())["age_group"].to_pylist()
    tells = np.mean([simulate.AGE_GROUPS[style] == group for style, group in zip(chunk.style, small, strict=True)])
    expected = simulate.AGE_TELLS + (1 - simulate.AGE_TELLS) / len(simulate.AGE_GROUPS)
    assert tells == pytest.approx(expected, abs=4.5 * np.sqrt(expected * (1 - expected) / 800))


def test_attributes_change_no_event(tmp_path, monkeypatch):
    simulate.write_logs(SMALL, tmp_path / "a")
    monkeypatch.setattr(simulate, "MAKERS", 7)
    monkeypatch.setattr(simulate, "AGE_TELLS", 0.1)
    simulate.write_logs(SMALL, tmp_path / "b")
    one, other = digests(tmp_path / "a"), digests(tmp_path / "b")
    assert {name for name in one if one[name] != other[name]} == {"items.parquet", "users.parquet"}


def test_embeddings_show_theme_and_style():
    shop = simulate.build_shop(SimulatorOptions())
    group = shop.theme * len(simulate.STYLES) + shop.style
    centre = np.stack([shop.embedding[group == number].mean(axis=0) for number in range(group.max() + 1)])
    nearest = np.square(shop.embedding[:, None] - centre).sum(axis=2).argmin(axis=1)
    assert (nearest == group).mean() > 0.95


def test_an_oracle_of_every_item_sums_to_one(tmp_path):
    options = SimulatorOptions(users=300, items=48, events_per_user=10, themes=9, embedding_dim=4)
    simulate.write_logs(options, tmp_path)
    table = simulate.read_oracle(tmp_path)
    assert all(len(set(row)) == 48 for row in table["items"].to_pylist())
    np.testing.assert_allclose(np.array(table["probabilities"].to_pylist()).sum(axis=1), 1.0, atol=1e-9)


def test_oracle_rows_are_ordered_and_leave_out_what_was_seen(sequences, oracle):
    items, probabilities = oracle
    assert (np.diff(probabilities, axis=1) <= 0).all()
    assert (probabilities.sum(axis=1) <= 1 + 1e-9).all()
    for row, sequence in zip(items, sequences, strict=True):
        assert not set(row) & set(sequence[:-1])


def test_last_events_happen_as_often_as_the_oracle_says(sequences, oracle):
    items, probabilities = oracle
    hit = items == np.array([sequence[-1] for sequence in sequences])[:, None]
    # every rank's count of hits lies within 4.5 standard deviations of the sum of its probabilities
    deviation = np.sqrt((probabilities * (1 - probabilities)).sum(axis=0))
    assert (np.abs(hit.sum(axis=0) - probabilities.sum(axis=0)) < 4.5 * deviation).all()
    # and the users whose first choice is sure take it more often than the others, by just as much
    sure = probabilities[:, 0] > np.median(probabilities[:, 0])
    for part in (sure, ~sure):
        p = probabilities[part, 0]
        assert abs(hit[part, 0].sum() - p.sum()) < 4.5 * np.sqrt((p * (1 - p)).sum())


def test_the_oracle_recalls_more_than_twice_what_counting_does(sequences, oracle):
    n_items, users = SimulatorOptions().items, len(sequences)
    popularity, follows = np.zeros(n_items), np.zeros((n_items, n_items))
    for sequence in sequences:
        train = sequence[:-2]
        np.add.at(popularity, train, 1)
        np.add.at(follows, (train[:-1], train[1:]), 1)

    def recall(scores):
        hits = 0
        for sequence, score in zip(sequences, scores, strict=True):
            unseen = score.copy()
            unseen[sequence[:-1]] = -1
            hits += sequence[-1] in np.argsort(-unseen)[:10]
        return hits / users

    floor = max(
        recall([popularity] * users), recall([follows[sequence[-2]] + 1e-6 * popularity for sequence in sequences])
    )
    best = np.mean([sequence[-1] in row[:10] for sequence, row in zip(sequences, oracle[0], strict=True)])
    assert best > 2.5 * floor
    assert 0.5 < best < 0.7
    assert floor > 10 / n_items


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"users": 0}, "users is 0"),
        ({"themes": 8}, "at least 9"),
        ({"items": 47}, "12 themes of 4 styles need at least 48"),
        ({"events_per_user": 3}, "events_per_user is 3"),
        ({"events_per_user": 40}, "no item twice"),
        ({"embedding_dim": 0}, "embedding_dim is 0"),
    ],
)
def test_sizes_that_make_no_shop_are_named(tmp_path, change, message):
    with pytest.raises(DataError, match=message):
        simulate.write_logs(SimulatorOptions(**(vars(SMALL) | change)), tmp_path / "logs")
    assert not (tmp_path / "logs").exists()


def test_a_missing_oracle_is_named(tmp_path):
    with pytest.raises(DataError, match=r"oracle\.parquet is missing"):
        simulate.read_oracle(tmp_path)
