import gzip
import io

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from raw_events import options, prepare_and_open, random_events, shuffled_rows, table, write_rows

from onetrain.data.errors import DataError
from onetrain.data.shards import read_items


def events_of(opts):
    """{user: [(item, time, behaviour, scenario, watch, duration)]} of a prepared source."""
    manifest, reader = prepare_and_open(opts)
    items = read_items(opts.prepared)["item"].to_pylist()
    found = {}
    for row in range(reader.n_users):
        user = reader.user(row)
        found[user.user] = [
            (items[i], int(t), manifest.behaviours[b], manifest.scenarios[s], int(w), int(d))
            for i, t, b, s, w, d in zip(
                *(user.item, user.timestamp_ms, user.behaviour, user.scenario, user.watch_ms, user.duration_ms),
                strict=True,
            )
        ]
    return found


def message_of(tmp_path, log, source=None):
    with pytest.raises(DataError) as caught:
        prepare_and_open(options(tmp_path, log, source=source))
    return str(caught.value)


def test_amazon(tmp_path):
    with gzip.open(tmp_path / "sequences.tsv.gz", "wt") as file:
        file.write("user_id\titem_ids\tgap_days\tfirst_day_unix\n10\t3 1 2\t0 0 5\t86400\n9\t2\t0\t\n")
    header = "item_id\tasin\ttitle\tattribute_ids\tterm_ids\n"
    (tmp_path / "items.tsv").write_text(header + '1\tB1\t5" brush\t7 8\tblue soft\n2\tB2\t\t\t\n3\tB3\tSoap\t7\t\n')
    source = {"reader": "amazon", "items": str(tmp_path / "items.tsv")}
    opts = options(tmp_path, tmp_path / "sequences.tsv.gz", source=source)
    day = 86_400_000
    rest = ("interact", "main", -1, -1)
    assert events_of(opts) == {
        "9": [("2", 0, *rest)],
        "10": [("3", day, *rest), ("1", day, *rest), ("2", 6 * day, *rest)],  # position decides within a day
    }
    items = read_items(tmp_path / "prepared")
    assert items["text"].to_pylist() == ['5" brush; blue soft', None, "Soap"]
    assert items["categories"].to_pylist() == [["7", "8"], None, ["7"]]


@pytest.mark.parametrize("line", ["1\t3 1\t0\t0", "1\t3\t0 4\t0", "1\t3\t0\tsoon"])
def test_amazon_broken_sequences_are_bad_rows(tmp_path, line):
    log = tmp_path / "sequences.tsv"
    log.write_text(f"user_id\titem_ids\tgap_days\tfirst_day_unix\n{line}\n")
    assert "1 of " in (found := message_of(tmp_path, log, {"reader": "amazon"}))
    assert str(log) in found


def test_movielens_layouts_agree(tmp_path):
    ratings = [("1", "10", "5", "978300760"), ("1", "20", "3", "978300700"), ("2", "10", "4", "978300000")]
    layouts = {
        "csv": (
            "ratings.csv",
            "userId,movieId,rating,timestamp\n" + "\n".join(f"{u},{i},{r}.0,{t}" for u, i, r, t in ratings),
        ),
        "dat": ("ratings.dat", "\n".join("::".join(rating) for rating in ratings)),
        "100k": ("u.data", "\n".join("\t".join(rating) for rating in ratings)),
    }
    flags = ["0"] * 19
    flags[3], flags[5] = "1", "1"
    movies = {
        "csv": (
            "movies.csv",
            'movieId,title,genres\n10,"Léon, ""the"" Pro",Animation|Comedy\n20,B,(no genres listed)\n',
        ),
        "dat": ("movies.dat", '10::Léon, "the" Pro::Animation|Comedy\n20::B::(no genres listed)\n'),
        "100k": ("u.item", f'10|Léon, "the" Pro|1-Jan-95|||{"|".join(flags)}\n20|B||||{"|".join(["0"] * 19)}\n'),
    }
    for name, (file, text) in layouts.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / file).write_text(text + "\n")
        item_file, item_text = movies[name]
        (folder / item_file).write_bytes(item_text.encode("utf-8" if name == "csv" else "latin-1"))
        source = {"reader": "movielens", "behaviours": {"5": "love", "4": "like"}}
        assert events_of(options(tmp_path, folder, source=source)) == {
            "1": [("20", 978300700000, "interact", "main", -1, -1), ("10", 978300760000, "love", "main", -1, -1)],
            "2": [("10", 978300000000, "like", "main", -1, -1)],
        }
        items = read_items(tmp_path / "prepared")
        assert items["text"].to_pylist() == ['Léon, "the" Pro', "B"]
        assert items["categories"].to_pylist()[0] == ["Animation", "Comedy"]
        assert not items["categories"].to_pylist()[1]
    plain = events_of(options(tmp_path, tmp_path / "csv" / "ratings.csv", source={"reader": "movielens"}))
    assert {event[2] for events in plain.values() for event in events} == {"interact"}


KUAIRAND = (
    *("user_id", "video_id", "time_ms", "is_click", "is_like", "is_follow", "is_comment", "is_forward", "is_hate"),
    *("long_view", "play_time_ms", "duration_ms", "is_profile_enter", "tab"),
)
KUAIRAND_ROWS = [
    (1, 5, 100, 0, 0, 0, 0, 0, 0, 0, 10, 50, 0, 1),
    (1, 5, 200, 1, 0, 0, 0, 0, 0, 0, 10, 50, 0, 1),
    (1, 6, 300, 1, 0, 0, 0, 0, 0, 1, 60, 50, 0, 2),
    (1, 6, 400, 1, 1, 0, 0, 0, 0, 1, 60, 50, 1, 2),
    (1, 6, 500, 1, 1, 1, 1, 1, 0, 1, 60, 50, 1, 2),
    (2, 6, 600, 1, 1, 0, 0, 0, 1, 1, 60, 0, 1, 2),
    (2, 7, 700, 1, 0, 0, 1, 0, 0, 1, 60, 50, 0, 2),
    (2, 7, 800, 0, 0, 0, 0, 1, 0, 0, 60, 50, 0, 2),
    (2, 7, 900, 1, 0, 0, 0, 0, 0, 0, 60, 50, 1, 2),
]


@pytest.mark.parametrize("layout", ["csv", "parquet"])
def test_kuairand_strongest_feedback(tmp_path, layout):
    folder = tmp_path / "log"
    folder.mkdir()
    columns = {name: [row[i] for row in KUAIRAND_ROWS] for i, name in enumerate(KUAIRAND)}
    if layout == "parquet":
        pq.write_table(pa.table(columns), folder / "log_standard.parquet")
        pq.write_table(pa.table({"video_id": [5, 6], "tag": ["12,3", None]}), tmp_path / "videos.parquet")
    else:
        lines = [",".join(KUAIRAND), *(",".join(map(str, row)) for row in KUAIRAND_ROWS)]
        (folder / "log_standard_a.csv").write_text("\n".join(lines[:4]) + "\n")
        (folder / "log_standard_b.csv").write_text("\n".join([lines[0], *lines[4:]]) + "\n")
        (folder / "log_random_4.csv").write_text("\n".join([lines[0], "9" + lines[1]]) + "\n")
        (folder / "user_features.csv").write_text("user_id,age\n1,2\n")
        (tmp_path / "videos.csv").write_text('video_id,tag\n5,"12,3"\n6,\n')
    source = {"reader": "kuairand", "items": str(tmp_path / f"videos.{layout}")}
    assert events_of(options(tmp_path, folder, source=source)) == {
        "1": [
            ("5", 100, "view", "1", 10, 50),
            ("5", 200, "click", "1", 10, 50),
            ("6", 300, "long_view", "2", 60, 50),
            ("6", 400, "like", "2", 60, 50),
            ("6", 500, "follow", "2", 60, 50),
        ],
        "2": [
            ("6", 600, "hate", "2", 60, 0),
            ("7", 700, "comment", "2", 60, 50),
            ("7", 800, "forward", "2", 60, 50),
            ("7", 900, "profile_enter", "2", 60, 50),
        ],
    }
    assert read_items(tmp_path / "prepared")["categories"].to_pylist() == [["12", "3"], None, None]


def test_columns_renames_and_maps(tmp_path):
    log = tmp_path / "log.tsv"
    log.write_text("uid\tsku\tts\tkind\n007\tA\t1.5\t3\n007\tB\t2\t4\n7\tA\t3\t\n")
    names = {"user": "uid", "item": "sku", "timestamp": "ts", "behaviour": "kind"}
    source = {"columns": names, "timestamp_unit": "s", "behaviours": {"3": "buy"}, "default_behaviour": "view"}
    assert events_of(options(tmp_path, log, source=source)) == {
        "007": [("A", 1500, "buy", "main", -1, -1), ("B", 2000, "4", "main", -1, -1)],
        "7": [("A", 3000, "view", "main", -1, -1)],
    }


@pytest.mark.parametrize(
    ("unit", "raw", "expected"),
    [
        ("ms", "1650812741436", 1650812741436),
        ("us", "1650812741436999", 1650812741436),
        ("s", "1650812741.436", 1650812741436),
        ("iso", "2022-04-24T15:05:41.436Z", 1650812741436),
        ("iso", "2022-04-24 17:05:41.436+02:00", 1650812741436),
    ],
)
def test_timestamp_units(tmp_path, unit, raw, expected):
    log = tmp_path / "log.csv"
    log.write_text(f"user,item,timestamp\na,x,{raw}\n")
    assert events_of(options(tmp_path, log, source={"timestamp_unit": unit}))["a"][0][1] == expected


@pytest.mark.parametrize("kind", [pa.timestamp("us"), pa.timestamp("ms", tz="UTC"), pa.timestamp("ns"), pa.int64()])
def test_parquet_timestamps_and_float_ids(tmp_path, kind):
    times = pa.array(np.array([1650812741436], "datetime64[ms]")).cast(pa.timestamp("ms"))
    times = times.cast(pa.int64()) if kind == pa.int64() else times.cast(pa.timestamp(kind.unit)).cast(kind)
    pq.write_table(pa.table({"user": [12.0], "item": [3.0], "timestamp": times}), tmp_path / "log.parquet")
    found = events_of(options(tmp_path, tmp_path / "log.parquet"))
    assert found == {"12": [("3", 1650812741436, "interact", "main", -1, -1)]}


def test_glob_folder_and_header_order(tmp_path):
    folder = tmp_path / "log"
    (folder / "day=1").mkdir(parents=True)
    (folder / "a.csv").write_text("user,item,timestamp\nu,1,1\n")
    (folder / "day=1" / "b.csv").write_text("timestamp;item;user\n2;1;u\n")
    with gzip.open(folder / "c.csv.gz", "wt") as file:
        file.write("item,user,timestamp\n2,u,3\n")
    (folder / "_SUCCESS").write_text("")
    (folder / "items.csv").write_text("id\n1\n")
    everything = events_of(options(tmp_path, folder, source={"items": str(folder / "items.csv")}))
    assert [event[:2] for event in everything["u"]] == [("1", 1), ("1", 2), ("2", 3)]
    assert len(events_of(options(tmp_path, folder / "[ab].csv"))["u"]) == 1


def test_remote_files_through_fsspec(tmp_path):
    fs = fsspec.filesystem("memory")
    rows = shuffled_rows(random_events(2), 0)
    local = events_of(options(tmp_path, write_rows(tmp_path / "log", rows)))
    buffer = io.BytesIO()
    pq.write_table(table(rows[::2]), buffer)
    fs.pipe("/bucket/log/a.parquet", buffer.getvalue())
    buffer = io.BytesIO()
    pq.write_table(table(rows[1::2]), buffer)
    fs.pipe("/bucket/log/b.parquet", buffer.getvalue())
    assert events_of(options(tmp_path, "memory://bucket/log")) == local
    assert events_of(options(tmp_path, "memory://bucket/log/*.parquet")) == local
    fs.pipe("/bucket/log.csv", b"user,item,timestamp\nu,1,1\n")
    assert list(events_of(options(tmp_path, "memory://bucket/log.csv"))) == ["u"]


def test_missing_files_and_columns(tmp_path):
    log = tmp_path / "log.csv"
    log.write_text("user_id,item,timestamp\na,x,1\n")
    found = message_of(tmp_path, log)
    assert "no column 'user'; its columns are user_id, item, timestamp. Did you mean 'user_id'?" in found
    assert "data.source.columns.user" in found
    names = {"user": "user_id"}
    assert "data.source.columns.watch_ms" in message_of(tmp_path, log, {"columns": {**names, "watch_ms": "watched"}})
    assert "Did you mean 'behaviour'?" in message_of(tmp_path, log, {"columns": {**names, "behavior": "item"}})
    assert "no column 'price'" in message_of(tmp_path, log, {"columns": names, "extra": ("price",)})
    assert "no file matches" in message_of(tmp_path, tmp_path / "*.parquet")
    assert "is empty" in message_of(tmp_path, "")
    assert "belong to reader 'columns'" in message_of(tmp_path, log, {"reader": "kuairand", "columns": names})
    other = write_rows(tmp_path / "other", [(1, 2, 3, 4, "a", "b", 1, 1, 1.0)])
    assert "no column 'user_id'" in message_of(tmp_path, other, {"reader": "kuairand"})


def test_empty_and_broken_files(tmp_path):
    log = tmp_path / "log.csv"
    log.write_text("user,item,timestamp\n")
    assert "the log has no rows" in message_of(tmp_path, log)
    log.write_text("")
    assert "no header line" in message_of(tmp_path, log)
    log.write_text("user,item,timestamp\na,x,1\na,x\n")
    found = message_of(tmp_path, log)
    assert str(log) in found
    assert "Line: 3" in found
    (tmp_path / "log.parquet").write_bytes(b"PAR1 but not really")
    assert str(tmp_path / "log.parquet") in message_of(tmp_path, tmp_path / "log.parquet")


def test_reader_names_are_checked(tmp_path):
    with pytest.raises(DataError, match="'netflix' is none of amazon, movielens"):
        prepare_and_open(options(tmp_path, "x", source={"reader": "netflix"}))
