import io
import json
import os

import pytest
from rich.console import Console
from run_folders import CONFIG, beats, night, write_lines
from typer.testing import CliRunner

from onetrain.launcher import status_table
from onetrain.launcher.cli import app
from onetrain.launcher.run_records import Follower, bytes_text, event_text, seconds_text
from onetrain.launcher.status import StatusReader
from onetrain.launcher.status_table import render


@pytest.fixture
def going(tmp_path):
    """The folder and the history of a run in step 1150 of its third attempt."""
    return tmp_path / "night", night(tmp_path / "night", going=True)


def printed(status, width=140):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(render(status))
    return console.export_text()


def put(folder, value):
    (folder / "heartbeats.json").write_text(json.dumps(value))


def test_a_run_that_goes_on(going):
    folder, history = going
    status = StatusReader(folder).read(history.time + 1)
    assert (status.state, status.alive, status.attempt) == ("running", True, 3)
    assert (status.world_size, status.wanted, status.step, status.steps) == (8, 8, 1150, 1200)
    # the pace of the last 20 log lines, from step 960 to 1150
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    train = {line["step"]: line for line in lines if line["kind"] == "train"}
    pace = (train[1150]["time"] - train[960]["time"]) / 190
    assert status.seconds_left == pytest.approx(50 * pace)
    assert status.loss == train[1150]["loss"]
    assert status.checkpoint["step"] == 1100
    saved = next(
        record["time"] for record in history.ledger if record["kind"] == "checkpoint" and record["step"] == 1100
    )
    assert status.checkpoint["age_s"] == pytest.approx(history.time + 1 - saved)
    assert (status.restarts, len(status.ranks), len(status.events)) == (2, 8, 6)
    wall = history.time + 1 - history.events[0]["time"]
    assert status.wall_s == pytest.approx(wall)
    assert status.ettr == pytest.approx((history.truth["compute"] + 1) / wall)  # the last second counts as a step
    text = printed(status)
    for part in (
        "night  running",
        "1,150 of 1,200 (96%)",
        "step 1,100",
        "14.3 GB",
        "2 restarts",
        "10.0.0.4",
        "trains from",
    ):
        assert part in text
    assert "HANGING" not in text


@pytest.mark.parametrize(
    ("late", "age", "mark"),
    [(0, 0.4, ""), (151, 0.4, "slow"), (301, 0.4, "hanging"), (0, 17, "slow"), (0, 31, "silent"), (301, 31, "silent")],
)
def test_marks_of_ranks(going, late, age, mark):
    folder, history = going
    value = beats(history, late=late)
    value["ranks"][7]["age_s"] = age
    put(folder, value)
    status = StatusReader(folder).read(history.time)
    assert [rank.mark for rank in status.ranks] == [""] * 7 + [mark]
    assert status_table.MARKS[mark] in printed(status)


def test_deadlines_of_the_run_count(going):
    folder, history = going
    put(folder, beats(history, late=100))
    assert StatusReader(folder).read(history.time).ranks[7].mark == ""
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("silence_s: 30.0", "deadlines_s: {step: 90}"))
    assert StatusReader(folder).read(history.time).ranks[7].mark == "hanging"
    (folder / "config.yaml").write_text(text.replace("silence_s: 30.0", "deadlines_s: {nonsense: 90}"))
    assert StatusReader(folder).read(history.time).ranks[7].mark == ""  # written by another version


def test_old_heartbeats_are_told_plainly(going):
    folder, history = going
    status = StatusReader(folder).read(history.time + 185)
    assert (status.state, status.alive, status.seconds_left) == ("silent", False, None)
    assert "no sign of life for 3 min; the run was running" in printed(status)
    assert {rank.mark for rank in status.ranks} == {""}  # nobody knows
    assert status.wall_s == pytest.approx(history.time - history.events[0]["time"])


@pytest.mark.parametrize(
    ("state", "after", "alive"), [("waiting", 1800, True), ("waiting", 1900, False), ("done", 5, False)]
)
def test_other_states(going, state, after, alive):
    folder, history = going
    put(folder, beats(history, state))
    status = StatusReader(folder).read(history.time + after)
    assert (status.alive, status.ranks) == (alive, ())
    assert status.state == (state if alive or state == "done" else "silent")
    assert ("waiting for 30 min" in printed(status)) == alive


def test_a_run_without_supervisor(going):
    folder, history = going
    (folder / "events.jsonl").unlink()
    (folder / "heartbeats.json").unlink()
    status = StatusReader(folder).read(history.time + 5)
    assert (status.state, status.alive, status.step, status.world_size) == ("alone", True, 1150, 8)
    assert StatusReader(folder).read(history.time + 100).state == "silent"
    history.entry("end", outcome="finished", step=1150)
    write_lines(folder / "ledger.jsonl", history.ledger)
    ended = StatusReader(folder).read(history.time + 100)
    assert (ended.state, ended.headline) == ("ended", "ended (finished) 100 s ago; it had no supervisor")


def test_torchrun_takes_over_from_a_supervisor(going):
    folder, history = going
    put(folder, beats(history, "failed"))
    history.spend("idle", 300)
    history.begin(0, supervised=False, step=1100, furthest=1150)
    write_lines(folder / "ledger.jsonl", history.ledger)
    status = StatusReader(folder).read(history.time + 3)
    assert (status.state, status.attempt) == ("alone", 4)


def test_the_reader_takes_up_what_is_new(going):
    folder, history = going
    reader = StatusReader(folder)
    before = reader.read(history.time)
    history.event("nodes", alive=["a", "b"], free=2)
    with (folder / "events.jsonl").open("a") as stream:
        stream.write(json.dumps(history.events[-1]) + "\n")
    after = reader.read(history.time)
    assert after.events[:-1] == before.events[1:]
    assert after.events[-1][1] == "2 nodes are alive, room for 2 more ranks"


def test_a_file_that_grows_is_cut_or_replaced(tmp_path):
    path = tmp_path / "log.jsonl"
    follower = Follower(path)
    assert follower.read() == []
    write_lines(path, [{"a": 1}, {"a": 2}])
    with path.open("a") as stream:
        stream.write('{"a": 3')
        stream.flush()
        assert [record["a"] for record in follower.read()] == [1, 2]
        stream.write('}\nno json\n[1]\n{"a": 4}\n')
    assert [record["a"] for record in follower.read()] == [1, 2, 3, 4]
    other = tmp_path / "other"
    write_lines(other, [{"a": 9}] * 20)
    os.replace(other, path)
    assert [record["a"] for record in follower.read()] == [9] * 20
    write_lines(path, [{"a": 5}])  # shorter
    assert [record["a"] for record in follower.read()] == [5]


def test_the_end_of_a_long_file(tmp_path, monkeypatch):
    monkeypatch.setattr(Follower, "TAIL", 500)
    path = tmp_path / "log.jsonl"
    write_lines(path, [{"a": number} for number in range(1000)])
    assert [record["a"] for record in Follower(path, most=10).read()] == list(range(990, 1000))


def test_many_ranks_show_those_with_marks(going):
    folder, history = going
    value = beats(history)
    value["ranks"] = [value["ranks"][0] | {"rank": rank} for rank in range(1000)]
    value["ranks"][777]["age_s"] = 40.0
    put(folder, value)
    lines = printed(StatusReader(folder).read(history.time)).splitlines()
    (line,) = [line for line in lines if "NO SIGN OF LIFE" in line]
    assert " 777 " in line
    assert "and 968 more ranks, all well" in lines


def onetrain(*arguments):
    return CliRunner().invoke(app, list(arguments))


def test_the_verb(going, tmp_path):
    folder, _ = going
    once = onetrain("status", str(folder))  # not a terminal: once
    assert once.exit_code == 0, once.output
    assert "no sign of life for" in once.output  # its heartbeats are of the past
    value = json.loads(onetrain("status", str(folder), "--json").output)
    assert (value["step"], value["ranks"][0]["node"], value["state"]) == (1150, "10.0.0.1", "silent")
    job = tmp_path / "job.yaml"
    job.write_text(f"name: night\nstorage_path: {tmp_path}\n")
    assert onetrain("status", str(job), "--once").output.splitlines()[2:4] == once.output.splitlines()[2:4]
    assert onetrain("status", str(job), "--set", "name=other").exit_code == 2
    for bad, why in ((str(tmp_path / "nothing"), "there is no"), (str(tmp_path), "holds no run")):
        failed = onetrain("status", bad)
        assert failed.exit_code == 2
        assert why in failed.output


def test_the_configuration_may_be_missing_or_broken(going):
    folder, history = going
    for text in ("", "- 1\n", "a: [", f"train: 5\nname: {CONFIG['name']}\nrecovery: 7\n"):
        (folder / "config.yaml").write_text(text)
        assert StatusReader(folder).read(history.time).state == "running"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0.44, "0.4 s"), (59.6, "60 s"), (179, "3 min"), (7500, "2 h 05 min"), (3 * 86400 + 3600, "3 d 1 h")],
)
def test_lengths_of_time(seconds, text):
    assert seconds_text(seconds) == text


def test_sizes():
    assert [bytes_text(count) for count in (None, 812, 14_300_000_000, 2.5e15)] == [
        "-",
        "812 B",
        "14.3 GB",
        "2.5e+03 TB",
    ]


def test_events_in_words(going):
    _, history = going
    texts = [event_text(event) for event in history.events]
    assert "attempt 1 node lost (rank 6, node 10.0.0.4): node 10.0.0.4 is gone, and ranks 6 and 7 with it" in texts
    assert "attempt 2 started on 6 ranks of 8 wanted (after hang)" in texts
    assert event_text({"time": 0, "event": "new_kind", "what": 1}) == '{"event": "new_kind", "what": 1}'
