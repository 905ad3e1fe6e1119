import errno
import json
import os
import re
import struct
import time
from collections import defaultdict
from dataclasses import replace
from io import FileIO
from pathlib import Path

import numpy as np
import pytest
import torch
import wandb
from wandb.proto.wandb_internal_pb2 import Record

from onetrain.cluster.beacon import BEACON
from onetrain.data.options import DataOptions
from onetrain.launcher.errors import ConfigError
from onetrain.launcher.options import RunConfig, TrackingOptions, TrainOptions
from onetrain.launcher.tracking import Tracker, cut_records

BLOCK = 1 << 15
CONFIG = RunConfig("my-run", data=DataOptions(prepared="/prepared"), tracking=TrackingOptions(wandb="disabled"))
OFFLINE = replace(CONFIG, tracking=TrackingOptions(wandb="offline", project="shop", tags=("a",)))
AUTO = replace(CONFIG, tracking=TrackingOptions())


@pytest.fixture(autouse=True)
def no_account(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr("onetrain.launcher.tracking.WANDB_TIMEOUT_S", 2)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    yield
    wandb.teardown()  # forgets the account


def records(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_records_are_on_disk_as_they_are_logged(tmp_path):
    tracker = Tracker(CONFIG, tmp_path, is_main=True)
    tracker.log(1, {"loss": 0.5, "tokens": np.int64(7), "norm": torch.tensor(2.0)})
    tracker.log(1, {"recall@10": np.float32(0.25)}, kind="valid")
    first, second = records(tmp_path)
    assert {key: first[key] for key in ("step", "attempt", "kind", "loss", "tokens", "norm")} == {
        "step": 1,
        "attempt": 1,
        "kind": "train",
        "loss": 0.5,
        "tokens": 7,
        "norm": 2.0,
    }
    assert (second["kind"], second["recall@10"]) == ("valid", 0.25)
    assert 0 <= second["time"] - first["time"] < 60
    tracker.close()


def test_nan_and_infinity_become_null(tmp_path):
    with Tracker(CONFIG, tmp_path, is_main=True) as tracker:
        tracker.log(1, {"loss": float("nan"), "norm": torch.tensor(float("inf")), "fine": 1})
        tracker.table("results", ["method", "recall"], [["popularity", float("nan")]], step=1)
    first, table = records(tmp_path)
    assert (first["loss"], first["norm"], first["fine"]) == (None, None, 1)
    assert table["rows"] == [["popularity", None]]


def test_a_table_is_recorded_at_its_step(tmp_path):
    with Tracker(CONFIG, tmp_path, is_main=True) as tracker:
        tracker.log(30, {"loss": 1.0})
        tracker.table("results", ["method", "recall"], [["popularity", np.float64(0.5)], ["model", "-"]], step=20)
    table = records(tmp_path)[1]
    assert (table["step"], table["kind"], table["name"]) == (20, "table", "results")
    assert table["columns"] == ["method", "recall"]
    assert table["rows"] == [["popularity", 0.5], ["model", "-"]]


@pytest.mark.parametrize("name", ["step", "time", "attempt", "kind"])
def test_a_metric_cannot_take_the_name_of_a_field(tmp_path, name):
    with Tracker(CONFIG, tmp_path, is_main=True) as tracker, pytest.raises(ValueError, match=name):
        tracker.log(1, {name: 1.0})
    assert records(tmp_path) == []


def test_only_rank_0_writes(tmp_path):
    with Tracker(OFFLINE, tmp_path / "run", is_main=False) as tracker:
        tracker.log(1, {"loss": 0.5})
        tracker.table("results", ["a"], [[1]], step=1)
    assert list(tmp_path.iterdir()) == []


def test_adding_to_a_run_that_is_over_cuts_nothing(tmp_path):
    with Tracker(CONFIG, tmp_path, is_main=True) as tracker:
        tracker.log(1, {"loss": 1.0})
        tracker.log(2, {"loss": 2.0})
    with Tracker(CONFIG, tmp_path, is_main=True, start_step=None) as tracker:
        tracker.table("results", ["a"], [[1]], step=1)
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 1]


def test_resuming_keeps_one_value_per_step(tmp_path):
    with Tracker(CONFIG, tmp_path, is_main=True) as tracker:
        for step in range(1, 8):
            tracker.log(step, {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "ti')  # died while writing
    with Tracker(CONFIG, tmp_path, is_main=True, start_step=4) as tracker:
        for step in range(5, 8):
            tracker.log(step, {"loss": -float(step)})
    assert [(record["step"], record["loss"]) for record in records(tmp_path)] == [
        *((step, float(step)) for step in range(1, 5)),
        *((step, -float(step)) for step in range(5, 8)),
    ]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_a_new_start_empties_the_records(tmp_path):
    with Tracker(CONFIG, tmp_path, is_main=True) as tracker:
        tracker.log(0, {"loss": 1.0})
        tracker.log(1, {"loss": 1.0})
    with Tracker(CONFIG, tmp_path, is_main=True):
        assert records(tmp_path) == []


def test_a_dropped_record_is_told(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n[]\n{"ste\n{"step": 2}\n')
    cut_records(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    warnings = capsys.readouterr().err
    assert "line 2" in warnings
    assert "line 3" in warnings


def test_a_full_disk_is_told_once_and_its_records_come_later(tmp_path, monkeypatch, capsys):
    sent, full = [], True
    monkeypatch.setattr(wandb.Run, "log", lambda self, values, step: sent.append((step, *values)))
    write, replaced = FileIO.write, os.replace

    def write_half(file, data):
        return write(file, data[: len(data) // 2]) if full else write(file, data)

    def replace_if_room(*paths):
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        replaced(*paths)

    class File(FileIO):
        write = write_half

    opened = Path.open
    tracker = Tracker(OFFLINE, tmp_path, is_main=True)
    monkeypatch.setattr(
        Path, "open", lambda path, mode="r", **o: File(path, mode) if mode == "ab" else opened(path, mode, **o)
    )
    monkeypatch.setattr("onetrain.launcher.tracking.os.replace", replace_if_room)
    capsys.readouterr()
    for step in (1, 2, 3):
        tracker.log(step, {"loss": float(step)})
        tracker.kept(step)
    assert (records(tmp_path), sent) == ([], [])
    assert capsys.readouterr().err.count("cannot be written") == 1
    full = False
    tracker.log(4, {"loss": 4.0})
    assert [record["loss"] for record in records(tmp_path)] == [1.0, 2.0, 3.0, 4.0]
    assert [step for step, *_ in sent] == [1, 2, 3]
    full = True
    tracker.log(5, {"loss": 5.0})
    tracker.close()  # still full: nothing is raised
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3, 4]


def test_a_step_is_sent_whole_though_a_later_attempt_adds_to_it(tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr(wandb.Run, "log", lambda self, values, step: sent.append((step, min(values, key=len))))
    tracker = Tracker(OFFLINE, tmp_path, is_main=True)
    for step in (1, 2):
        tracker.log(step, {"a": 1.0})
    tracker.kept(2)
    tracker.close(whole=False)  # drained before a validation
    assert [step for step, _ in sent] == [1]
    with Tracker(OFFLINE, tmp_path, is_main=True, start_step=2, attempt=2) as tracker:
        assert (tracker.has(2, "train"), tracker.has(2, "valid")) == (True, False)
        assert [step for step, _ in sent] == [1]
        tracker.log(2, {"b": 1.0}, kind="valid")
    assert sent == [(1, "train/a"), (2, "train/a"), (2, "valid/b")]


def test_wandb_offline_keeps_one_id_over_restarts(tmp_path, capsys):
    for start_step in (0, 1):
        with Tracker(OFFLINE, tmp_path, is_main=True, start_step=start_step) as tracker:
            tracker.log(start_step + 1, {"loss": 0.5, "odd": float("nan")})
            tracker.table("results", ["method", "recall"], [["popularity", 0.5], ["model", "-"]], start_step + 1)
    name = (tmp_path / "wandb_run_id").read_text().strip()
    files = list(tmp_path.glob(f"wandb/offline-run-*-{name}*/run-{name}.wandb"))
    assert files
    written = b"".join(file.read_bytes() for file in files)
    for part in (b"my-run", b"shop", b"train/loss", b"results", b"codebook"):  # codebook: of the configuration
        assert part in written
    assert "wandb: offline" in capsys.readouterr().err
    assert wandb.run is None


def wandb_history(run_dir, name):
    """Every (step, metric) of a wandb run with its values, from the files of all its offline parts."""
    found = defaultdict(list)
    for path in sorted(run_dir.glob(f"wandb/offline-run-*-{name}*/run-{name}.wandb")):
        data, at, record = path.read_bytes(), 7, b""
        while at + 7 <= len(data):  # LevelDB's log format, in blocks of 32 KiB
            if BLOCK - at % BLOCK < 7:
                at += BLOCK - at % BLOCK
                continue
            _, size, kind = struct.unpack("<IHB", data[at : at + 7])
            record += data[at + 7 : at + 7 + size]
            at += 7 + size
            if kind in (1, 4):  # whole, or the last part
                parsed = Record.FromString(record)
                for item in parsed.history.item:
                    found[parsed.history.step.num, "/".join(item.nested_key)].append(json.loads(item.value_json))
                record = b""
    return {key: values for key, values in found.items() if not key[1].startswith("_")}


def jsonl_history(run_dir):
    return {
        (record["step"], name if name == "attempt" else f"{record['kind']}/{name}"): [value]
        for record in records(run_dir)
        for name, value in record.items()
        if name not in ("step", "time", "kind")
    }


def test_wandb_and_jsonl_have_one_value_per_step_over_crashes(tmp_path, capsys):
    """Attempts: the checkpoint it goes on from, the last step, the last checkpoint it was told of, exit code."""
    rng, names = np.random.default_rng(3), []
    attempts = [(0, 7, 4, 1), (6, 12, 9, 1), (9, 10, 0, 1), (9, 12, 0, 0), (5, 8, 0, 0)]
    for attempt, (start, last, kept, code) in enumerate(attempts, 1):
        tracker = Tracker(OFFLINE, tmp_path, is_main=True, start_step=start, attempt=attempt)
        for step in range(start + 1, last + 1):
            tracker.log(step, {"loss": rng.random(), "norm": rng.random()})
            if step == kept:
                tracker.kept(step)
            if step % 2 == 0:
                tracker.log(step, {"recall": rng.random()}, kind="valid")
        tracker.close(code)
        names.append((tmp_path / "wandb_run_id").read_text().strip())
        if code == 0:
            history, deadline = jsonl_history(tmp_path), time.monotonic() + 20
            assert {step for step, _ in history} == set(range(1, last + 1))
            while wandb_history(tmp_path, names[-1]) != history and time.monotonic() < deadline:
                time.sleep(0.05)  # its service ends the file a moment later
            assert wandb_history(tmp_path, names[-1]) == history
    assert len(set(names[:4])) == 1
    # step 5 is before what wandb had got, which it cannot take back: a new run, whole from the start
    assert names[4] != names[3]
    assert "wandb has steps up to 12: the history up to step 5 gets a new run" in capsys.readouterr().err


def test_a_run_that_never_resumes_gets_a_new_wandb_id(tmp_path, monkeypatch):
    never = replace(OFFLINE, train=TrainOptions(resume="never"))
    names = set()
    for _ in range(2):
        Tracker(never, tmp_path, is_main=True).close()
        names.add((tmp_path / "wandb_run_id").read_text())
    assert len(names) == 2
    monkeypatch.setattr(BEACON, "first", False)  # a later attempt of the same start
    Tracker(never, tmp_path, is_main=True).close()
    assert (tmp_path / "wandb_run_id").read_text() in names


def test_auto_without_an_account_is_offline(tmp_path):
    Tracker(AUTO, tmp_path, is_main=True).close()
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 1


def test_auto_follows_wandb_mode(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    Tracker(AUTO, tmp_path, is_main=True).close()
    assert not (tmp_path / "wandb").exists()


def test_auto_with_a_broken_account_says_why_and_goes_on_offline(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "short")
    Tracker(AUTO, tmp_path, is_main=True).close()
    message = capsys.readouterr().err
    assert re.search(r"warning: wandb cannot go online.*WANDB_API_KEY invalid", message)
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 1


def test_auto_goes_on_offline_when_the_server_cannot_be_reached(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    Tracker(AUTO, tmp_path, is_main=True).close()
    assert "wandb cannot go online" in capsys.readouterr().err
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 1


def test_online_without_an_account_is_an_error(tmp_path):
    online = replace(CONFIG, tracking=TrackingOptions(wandb="online"))
    with pytest.raises(ConfigError, match=r"tracking\.wandb: wandb cannot start online"):
        Tracker(online, tmp_path, is_main=True)


def test_an_exception_marks_the_wandb_run_as_failed(tmp_path, monkeypatch):
    codes = []
    monkeypatch.setattr(wandb.Run, "finish", lambda self, exit_code: codes.append(exit_code))
    for error in (RuntimeError("a bug"), ConfigError("a reason")):
        with pytest.raises(type(error)), Tracker(OFFLINE, tmp_path, is_main=True):
            raise error
    assert codes == [1, 2]
