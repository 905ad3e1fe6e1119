"""Attributes of items and users, from their files to batches, against plain look-ups."""

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from raw_events import options, prepare_and_open, random_events, reference, shuffled_rows, write_rows

from onetrain.data.batch import BatchBuilder
from onetrain.data.categorical import last_categories
from onetrain.data.errors import DataError
from onetrain.data.features import FeatureNames, feature_sizes, user_feature_sizes
from onetrain.data.item_table import ItemTable
from onetrain.data.manifest import Manifest
from onetrain.data.options import BatchOptions, DataOptions, SimulatorOptions, SourceOptions
from onetrain.data.prepare import prepare
from onetrain.data.samples import SampleIndex
from onetrain.data.shards import read_items
from onetrain.data.sids import SidMap

ATTRIBUTES = {
    "item_features": {"maker": "brand", "shelf": "shelf_no"},
    "user_features": {"city": "town", "age_years": "age"},
}


def random_attributes(seed, users, items=12):
    """({item: (brand, shelf)}, {user: (town, age)}): text and numbers, None where unknown; not everybody has a row."""
    rng = np.random.default_rng(seed)

    def pick(values):
        return values[rng.integers(len(values))]

    of_items = {
        item: (pick(["Zoë & co", "acme", "Acme", "10", "9", None]), pick([3.0, 20.0, None, 1.5]))
        for item in range(items)
    }
    of_users = {user: (pick(["Ulm", "Bonn", "", None]), pick([None, 7, 30, 100])) for user in users}
    for table in (of_items, of_users):
        for key in rng.choice(list(table), 3, replace=False):
            del table[key]
    return of_items, of_users


def write_attributes(folder, of_items, of_users, seed=0, suffix=".parquet"):
    """The two files, rows in an order of their own; beside every row one of an unknown id."""
    rng = np.random.default_rng(seed)
    items = [(item, *values) for item, values in of_items.items()] + [(777, "rare", 3.0)]
    users = [(user, *values) for user, values in of_users.items()] + [(5555, "Rome", 12)]
    names = {"items": ("id", "brand", "shelf_no"), "users": ("uid", "town", "age")}
    paths = {}
    for kind, rows in (("items", items), ("users", users)):
        shuffled = [rows[index] for index in rng.permutation(len(rows))]
        table = pa.table({name: [row[i] for row in shuffled] for i, name in enumerate(names[kind])})
        paths[kind] = str(folder / f"{kind}{suffix}")
        if suffix == ".csv":
            pyarrow.csv.write_csv(table, paths[kind])
        else:
            pq.write_table(table, paths[kind])
    return {**paths, "user_columns": {"id": "uid"}, **ATTRIBUTES}


def as_name(value):
    return None if value in (None, "") else f"{value:g}" if isinstance(value, float) else str(value)


def named(names, number):
    return None if number == 0 else names[number - 1]


@pytest.mark.parametrize("seed", range(3))
def test_equals_plain_reference(tmp_path, seed):
    events = random_events(seed, users=40)
    log = write_rows(tmp_path / "log", shuffled_rows(events, seed), files=2)
    of_items, of_users = random_attributes(seed, list(events))
    source = write_attributes(tmp_path, of_items, of_users)
    manifest, reader = prepare_and_open(options(tmp_path, log, source=source, min_user_events=3, shard_events=100))
    assert len(manifest.shards) > 1
    items = read_items(tmp_path / "prepared")
    for place, name in enumerate(("maker", "shelf")):
        names = manifest.item_features[name]
        assert list(names) == sorted({as_name(v[place]) for v in [*of_items.values(), ("rare", 3.0)]} - {None})
        assert items.schema.field(f"f_{name}").type == pa.int32()
        for item, number in zip(items["item"].to_pylist(), items[f"f_{name}"].to_pylist(), strict=True):
            expected = ("rare", 3.0) if item == "777" else of_items.get(int(item), (None, None))
            assert named(names, number) == as_name(expected[place])
    for place, name in enumerate(("city", "age_years")):
        names = manifest.user_features[name]
        in_log = [values for user, values in of_users.items() if user in events]
        assert list(names) == sorted({as_name(values[place]) for values in in_log} - {None})  # no Rome
        for row in range(reader.n_users):
            user = reader.user(row)
            expected = of_users.get(int(user.user), (None, None))[place]
            assert named(names, user.features[name]) == as_name(expected)
    assert reader.n_users == sum(len(sequence) >= 3 for sequence in reference(events).values()) < len(events)
    report = manifest.report
    assert report["users_not_in_file"] == len(set(events) - set(of_users)) == 3
    assert report["duplicate_users_dropped"] == report["bad_users_dropped"] == 0


def test_row_order_and_layout_do_not_matter_but_values_do(tmp_path):
    events = random_events(1)
    log = write_rows(tmp_path / "log", shuffled_rows(events, 0))
    of_items, of_users = random_attributes(1, list(events))
    found = []
    for seed, suffix in enumerate((".parquet", ".parquet", ".csv")):
        source = write_attributes(tmp_path, of_items, of_users, seed, suffix)
        found.append(prepare(options(tmp_path, log, source=source)))
    assert found[0] == found[1] == found[2]
    assert Manifest.load(tmp_path / "prepared") == found[0]
    plain = prepare(options(tmp_path, log, source={"items": source["items"]}))
    assert plain.item_features == plain.user_features == {}
    user, item = next(iter(of_users)), next(iter(of_items))
    changes = ({**of_items, item: ("new", 3.0)}, of_users), (of_items, {**of_users, user: ("Bonn", 8)})
    manifests = [prepare(options(tmp_path, log, source=write_attributes(tmp_path, *both))) for both in changes]
    assert len({m.fingerprint for m in (found[0], plain, *manifests)}) == 4
    assert {m.catalogue_fingerprint for m in (found[0], plain, *manifests)} == {found[0].catalogue_fingerprint}


def test_repeated_ids_keep_the_first_by_value_in_any_order(tmp_path):
    (tmp_path / "log.csv").write_text("user,item,timestamp\na,x,1\nb,x,1\n")
    rows = ["a,Ulm,3", "a,Bonn,9", "a,,1", "b,,2", "b,,1"]
    for order in (rows, rows[::-1]):
        (tmp_path / "users.csv").write_text("\n".join(["id,town,age", *order]) + "\n")
        source = {"users": str(tmp_path / "users.csv"), "user_features": ATTRIBUTES["user_features"]}
        manifest, reader = prepare_and_open(options(tmp_path, tmp_path / "log.csv", source=source))
        assert manifest.report["duplicate_users_dropped"] == 3
        assert manifest.user_features == {"city": ("Bonn",), "age_years": ("1", "9")}
        assert reader.user(0).features == {"city": 1, "age_years": 2}
        assert reader.user(1).features == {"city": 0, "age_years": 1}


def test_batches_carry_attributes(tmp_path):
    events = random_events(2, users=25)
    of_items, of_users = random_attributes(2, list(events))
    source = write_attributes(tmp_path, of_items, of_users)
    log = write_rows(tmp_path / "log", shuffled_rows(events, 2))
    manifest, reader = prepare_and_open(options(tmp_path, log, source=source))
    items, table = ItemTable.load(tmp_path / "prepared"), read_items(tmp_path / "prepared")
    assert feature_sizes(manifest, items)["maker"] == 1 + len(manifest.item_features["maker"])
    sizes = {name: 1 + len(names) for name, names in manifest.user_features.items()}
    assert user_feature_sizes(manifest) == {"user": None, **sizes}
    sids = SidMap(np.zeros((len(table), 3), np.int64), (2, 2, 2), (), manifest.catalogue_fingerprint)
    index = SampleIndex(reader, "train", BatchOptions())
    numbers = range(0, len(index), 7)
    samples = [index[number] for number in numbers]
    wanted = FeatureNames(("maker",), ("city", "age_years"), (), ("shelf",))
    batch = BatchBuilder(sids, manifest, items, BatchOptions(), wanted).build(index.rows(numbers))
    maker, shelf = (table[f"f_{name}"].to_pylist() for name in ("maker", "shelf"))
    for row, sample in enumerate(samples):
        history, target = sample.user.item[sample.start : sample.end], sample.user.item[sample.requests[0].targets[0]]
        columns = batch.sequences["history"]
        assert columns.features["maker"][row, : len(history)].tolist() == [maker[item] for item in history]
        assert batch.target_features["shelf"][row].tolist() == [shelf[target]]
        assert {name: int(ids[row]) for name, ids in batch.user.items()} == sample.user.features
    assert max(map(max, (batch.user["city"].tolist(), maker, shelf))) > 1


def message_of(tmp_path, log, source, **kwargs):
    with pytest.raises(DataError) as caught:
        prepare_and_open(options(tmp_path, log, source=source, **kwargs))
    assert not (tmp_path / "prepared").exists()
    return str(caught.value)


def test_wrong_files_and_columns_are_named(tmp_path):
    log = tmp_path / "log.csv"
    log.write_text("user,item,timestamp\na,x,1\nb,y,1\n")
    users, items = tmp_path / "users.csv", tmp_path / "items.csv"
    users.write_text("user_no,town\na,Ulm\n")
    items.write_text("id,brand\nx,acme\n")
    files = {"users": str(users), "items": str(items)}
    for change, message in [
        ({}, r"users.csv has no column 'id'; its columns are user_no, town"),
        ({"user_columns": {"id": "user"}}, r"no column 'user'.*Did you mean 'user_no'\? Correct .*user_columns.id"),
        ({"user_columns": {"key": "user_no"}}, r"user_columns: 'key' is no canonical column \(id\)"),
        (
            {"user_columns": {"id": "user_no"}, "user_features": {"city": "twon"}},
            r"no column 'twon'.*'town'\? Correct data.source.user_features.city",
        ),
        (
            {"users": None, "item_features": {"maker": "brnd"}},
            r"items.csv has no column 'brnd'.*'brand'\? Correct data.source.item_features.maker",
        ),
        ({"users": None, "user_features": {"city": "town"}}, r"user_features needs a user file"),
        ({"users": None, "items": None, "item_features": {"maker": "brand"}}, r"item_features needs an item file"),
        ({"users": str(tmp_path / "none.csv")}, r"data.source.users: no file matches"),
        ({"reader": "kuairand", "user_columns": {"id": "user_no"}}, r"belong to reader 'columns'"),
        *(
            ({"item_features": {name: "brand"}}, rf"item_features: '{name}' cannot name an attribute")
            for name in ("gap", "category", "x_maker", "the maker", "user")
        ),
        ({"user_features": {"hour": "town"}}, r"user_features: 'hour' cannot name an attribute"),
        ({"item_features": {"maker": "brand", "Maker": "id"}}, r"differ only in upper and lower case"),
    ]:
        with pytest.raises(DataError, match=message):
            prepare(options(tmp_path, log, source={**files, **change}))
    pq.write_table(pa.table({"id": ["a"], "towns": [["Ulm", "Bonn"]]}), tmp_path / "lists.parquet")
    source = {"users": str(tmp_path / "lists.parquet"), "user_features": {"city": "towns"}}
    assert "'towns' of" in (found := message_of(tmp_path, log, source))
    assert "holds lists or records (VARCHAR[])" in found


def test_rows_without_id_are_an_error_or_dropped_and_counted(tmp_path):
    log, users = tmp_path / "log.csv", tmp_path / "users.csv"
    log.write_text("user,item,timestamp\na,x,1\nb,y,1\n")
    users.write_text("id,town\na,Ulm\n,Rome\n,Bonn\n")
    source = {"users": str(users), "user_features": {"city": "town"}}
    assert "data.source.users: 2 of 3 rows have no id" in message_of(tmp_path, log, source)
    manifest, reader = prepare_and_open(options(tmp_path, log, source=source, bad_rows="drop"))
    assert manifest.report["bad_users_dropped"] == 2
    assert manifest.report["users_not_in_file"] == 1
    assert manifest.user_features == {"city": ("Ulm",)}
    assert [reader.user(row).features for row in (0, 1)] == [{"city": 1}, {"city": 0}]
    users.write_text("id,town\na\n")
    with pytest.raises(DataError, match=r"data.source.users: cannot read .*users.csv"):
        prepare(options(tmp_path / "new", log, source=source))


def test_ids_of_all_files_are_read_alike(tmp_path):
    """Whole floats, integers that had nulls in another program, are the ids of the log."""
    pq.write_table(pa.table({"user": [1, 2], "item": [5, 6], "timestamp": [1, 1]}), tmp_path / "log.parquet")
    pq.write_table(pa.table({"id": [1.0, 2.0], "town": ["Ulm", "Bonn"]}), tmp_path / "users.parquet")
    pq.write_table(pa.table({"id": [5.0, 6.0], "brand": [7.0, np.nan]}), tmp_path / "items.parquet")
    source = {
        "users": str(tmp_path / "users.parquet"),
        "items": str(tmp_path / "items.parquet"),
        "user_features": {"city": "town"},
        "item_features": {"maker": "brand"},
    }
    manifest, reader = prepare_and_open(options(tmp_path, tmp_path / "log.parquet", source=source))
    assert [reader.user(row).features["city"] for row in (0, 1)] == [2, 1]
    items = read_items(tmp_path / "prepared")
    assert (items["item"].to_pylist(), items["f_maker"].to_pylist()) == (["5", "6"], [1, 0])
    assert manifest.item_features == {"maker": ("7",)}


def test_a_folder_may_hold_log_items_and_users(tmp_path):
    folder = tmp_path / "everything"
    folder.mkdir()
    (folder / "log.csv").write_text("user,item,timestamp\na,x,1\n")
    (folder / "items.csv").write_text("id,brand\nx,acme\n")
    (folder / "users.csv").write_text("id,town\na,Ulm\n")
    source = {"items": str(folder / "items.csv"), "users": str(folder / "users.csv")}
    source |= {"item_features": {"maker": "brand"}, "user_features": {"city": "town"}}
    manifest, reader = prepare_and_open(options(tmp_path, folder, source=source))
    assert (manifest.events, reader.user(0).features) == (1, {"city": 1})
    with pytest.raises(DataError, match="only the item or user file"):
        prepare(options(tmp_path, folder / "users.csv", source=source))


def test_other_readers_take_attributes_too(tmp_path):
    (tmp_path / "ratings.dat").write_text("1::10::5::978300760\n2::20::3::978300700\n")
    (tmp_path / "movies.dat").write_text("10::Léon (1994)::Animation|Comedy\n20::B (1999)::Drama\n", encoding="latin-1")
    (tmp_path / "users.dat").write_text("1::F::25::10::48067\n2::M::56::16::70072\n")
    (tmp_path / "u.user").write_text("1|24|M|technician|85711\n")
    source = {"reader": "movielens", "users": str(tmp_path), "user_features": {"job": "occupation", "sex": "gender"}}
    source |= {"item_features": {"title": "title"}}
    manifest, reader = prepare_and_open(options(tmp_path, tmp_path / "ratings.dat", source=source))
    assert manifest.user_features == {"job": ("10", "16"), "sex": ("F", "M")}
    assert manifest.item_features == {"title": ("B (1999)", "Léon (1994)")}
    assert reader.user(1).features == {"job": 2, "sex": 2}
    source["users"] = str(tmp_path / "u.user")
    manifest, reader = prepare_and_open(options(tmp_path, tmp_path / "ratings.dat", source=source))
    assert manifest.user_features == {"job": ("technician",), "sex": ("M",)}
    assert reader.user(1).features == {"job": 0, "sex": 0}

    (tmp_path / "sequences.tsv").write_text("user_id\titem_ids\tgap_days\tfirst_day_unix\n7\t3 1\t0 1\t86400\n")
    (tmp_path / "items.tsv").write_text("item_id\ttitle\tattribute_ids\tshop\n1\tA\t7\tS\n3\tB\t8\tT\n")
    (tmp_path / "people.csv").write_text("user_id,town\n7,Ulm\n")
    source = {"reader": "amazon", "items": str(tmp_path / "items.tsv"), "item_features": {"shop": "shop"}}
    source |= {"users": str(tmp_path / "people.csv"), "user_features": {"city": "town"}}
    manifest, reader = prepare_and_open(options(tmp_path, tmp_path / "sequences.tsv", source=source))
    assert reader.user(0).features == {"city": 1}
    assert read_items(tmp_path / "prepared")["f_shop"].to_pylist() == [1, 2]


def test_simulated_attributes(tmp_path):
    shop = SimulatorOptions(users=60, items=150, events_per_user=8, themes=12, embedding_dim=6, seed=3)
    source = SourceOptions("simulator", str(tmp_path / "shop"), simulator=shop)
    plain = prepare(DataOptions(str(tmp_path / "prepared"), source))
    wanted = {"item_features": {"maker": "maker"}, "user_features": {"age_group": "age_group"}}
    manifest = prepare(DataOptions(str(tmp_path / "prepared"), dataclasses.replace(source, **wanted)))
    assert manifest.fingerprint != plain.fingerprint
    assert len(manifest.user_features["age_group"]) == 4
    assert 12 < len(manifest.item_features["maker"]) <= 36
    # logs of before there were attributes are written again
    marker = tmp_path / "shop" / "simulator.json"
    marker.write_text(marker.read_text().replace(',\n  "version": 2', ""))
    (tmp_path / "shop" / "users.parquet").unlink()
    again = prepare(DataOptions(str(tmp_path / "prepared"), dataclasses.replace(source, **wanted)))
    assert again == manifest


def test_the_last_category_is_the_most_specific():
    lists = [["a", "z"], None, [], ["z", "b"], ["b", None], [""], ["z"], ["c", "b"]]
    ids, names = last_categories(pa.chunked_array([lists[:3], lists[3:]], pa.list_(pa.string())))
    assert names == ("b", "z")
    assert ids.tolist() == [2, 0, 0, 1, 0, 0, 2, 1]
    ids, names = last_categories(pa.chunked_array([lists, lists], pa.list_(pa.string())).slice(2, 7))
    assert ids.tolist() == [0, 1, 0, 0, 2, 1, 2]
    ids, names = last_categories(pa.chunked_array([[None, None]], pa.list_(pa.string())))
    assert (ids.tolist(), names) == ([0, 0], ())
