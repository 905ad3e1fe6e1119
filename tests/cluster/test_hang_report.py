"""The report of a hang as people read it."""

import random

from hypothesis import given
from hypothesis import strategies as st

from onetrain.cluster.hang_report import MOST_ROWS, last_collective, report_text, short_message, spans, write_report
from onetrain.cluster.watch import RankView, Verdict

REDUCING = """Process {pid}: ray::Worker.run
Python v3.11.7 (/usr/bin/python3.11)

Thread {pid} (active): "MainThread"
    all_reduce (torch/distributed/distributed_c10d.py:3125)
    wrapper (torch/distributed/c10d_logger.py:83)
    all_reduce_sum (onetrain/parallel/process_group.py:61)
    train (onetrain/launcher/train.py:99)
    run (onetrain/cluster/worker.py:80)
Thread {gc} (idle): "PythonGCThread"
    Condition.wait (threading.py:327)
    PythonGCThread.run (ray/_private/gc_collect_manager.py:29)
Thread {gc} (idle): "prefetch"
    wait (threading.py:320)
    take (onetrain/data/stream.py:70)
    Thread._bootstrap (threading.py:1002)
Thread {gc} (idle): "Thread-1 (_show_beats)"
    Worker._show_beats (onetrain/cluster/worker.py:131)
    Thread.run (threading.py:982)
"""
READING = """Process 22: ray::Worker.run
Python v3.11.7 (/usr/bin/python3.11)

Thread 22 (active): "MainThread"
    read (somewhere/slow_disk.py:7)
    train (onetrain/launcher/train.py:90)
"""
NO_STACK = "no answer: the node did not answer within 30 s"


def view(rank, phase="step", collectives=42, **values):
    named = {"rank": rank, "node": f"10.0.0.{rank % 4}", "pid": 100 + rank, "phase": phase, "in_phase_s": 301.4}
    counts = {} if collectives is None else {"world": collectives}
    return RankView(**named | {"step": 17, "position": 544, "collectives": counts, "age_s": 0.4} | values)


def verdict_of(*ranks):
    message = f"rank {ranks[0]} has been in phase data_wait for 301 s"
    return Verdict("deadline", list(ranks), "data_wait", 301.4, 1.4, message)


def reducing(pid):
    return REDUCING.format(pid=pid, gc=pid + 1000)


def test_a_report_of_four_ranks_fits_a_page(tmp_path):
    views = [view(rank) for rank in range(4)]
    views[1] = view(1, "data_wait", 41)
    views[3] = view(3, age_s=None, pid=None, collectives=None)
    stacks = {0: reducing(100), 1: READING, 2: reducing(102), 3: NO_STACK}
    path = write_report(tmp_path / "run", 3, verdict_of(1), views, stacks)
    assert path == tmp_path / "run" / "hang_3.txt"
    assert [file.name for file in path.parent.iterdir()] == ["hang_3.txt"]
    text = path.read_text()
    lines = text.splitlines()
    assert len(lines) < 50
    assert max(map(len, lines)) <= 120
    assert "rank 1 has begun 41 collectives of group world, the others 42" in text
    assert "ranks 0, 2: all_reduce" in text
    assert "rank 1: in no collective, but at read (somewhere/slow_disk.py:7)" in text
    assert "rank 3: not known, no stack" in text
    (marked,) = [line for line in lines if line.startswith("->")]
    assert marked.split()[:8] == ["->", "1", "10.0.0.1", "101", "data_wait", "301", "s", "17"]
    assert f"--- rank 3\n{NO_STACK}" in text
    assert text.count("torch/distributed/distributed_c10d.py") == 1  # two equal stacks
    assert text.count("prefetch") == 1
    assert not any(hidden in text for hidden in ("PythonGCThread", "_show_beats", "_bootstrap"))
    assert "(2 threads that only wait: not shown)" in text


def test_a_stopped_process_is_told():
    stopped = f"the process is stopped by a signal\n{reducing(101)}"
    text = report_text(1, verdict_of(1), [view(0), view(1)], {0: reducing(100), 1: stopped})
    assert '--- rank 1\nthe process is stopped by a signal\nThread (active): "MainThread"\n' in text
    message = short_message(verdict_of(1), [view(1)], {1: stopped}, "r")
    assert "rank 1: in all_reduce, the process is stopped by a signal. Stacks" in message


def test_the_short_message():
    views = [view(0), view(1, "data_wait", 41)]
    message = short_message(verdict_of(1), views, {0: reducing(1), 1: READING}, "run/hang_1.txt")
    assert message == (
        "rank 1 has been in phase data_wait for 301 s; rank 1: at read (somewhere/slow_disk.py:7); rank 1 has begun 41 "
        "collectives of group world, the others 42. Stacks of all ranks: run/hang_1.txt"
    )
    assert "rank 0: in all_reduce. Stacks" in short_message(verdict_of(0), views[:1], {0: reducing(1)}, "r")
    assert f"rank 1: {NO_STACK};" in short_message(verdict_of(1), views, {1: NO_STACK}, "r")
    assert "rank 1: no answer: nobody asked" in short_message(verdict_of(1), views, {}, "r")


def test_counts_of_a_silent_rank_are_old():
    text = report_text(1, verdict_of(1), [view(0), view(1, collectives=40, age_s=31.0)], {})
    assert "rank 1 has begun 40 (when last heard) collectives of group world, the others 42" in text


def test_what_counts_may_be_in_another_thread():
    assert last_collective(reducing(5)) == "all_reduce"
    assert last_collective(READING) is None
    assert last_collective(NO_STACK) is None
    in_a_thread = """Thread 1 (idle): "MainThread"
    Worker.main_loop (ray/_private/worker.py:1069)
Thread 2 (idle)
    read (somewhere/slow_disk.py:7)
    actor_method_executor (ray/_private/function_manager.py:740)
"""
    text = report_text(1, verdict_of(0), [view(0)], {0: in_a_thread})
    assert "in no collective, but at read (somewhere/slow_disk.py:7)" in text
    assert "function_manager" not in text
    engine = READING + 'Thread 23 (active): "pt_autograd_0"\n    reduce_scatter (deepspeed/comm/torch.py:9)\n'
    assert last_collective(engine) == "reduce_scatter"


def test_hundreds_of_ranks_share_rows_and_stacks():
    ranks = 512
    views = [view(rank, age_s=random.Random(rank).random(), in_phase_s=300.0 + rank / ranks) for rank in range(ranks)]
    views[77] = view(77, "data_wait", 41)
    stacks = {rank: reducing(1000 + rank) for rank in range(ranks)} | {77: READING, 400: NO_STACK}
    text = report_text(1, verdict_of(77), views, stacks)
    assert len(text.splitlines()) < 60
    assert "0-76, 78-511" in text
    assert "--- ranks 0-76, 78-399, 401-511\n" in text
    assert text.index("--- rank 77") < text.index("--- ranks 0-76")
    few = report_text(1, verdict_of(77), views[:MOST_ROWS], stacks)
    assert (
        sum(line.split()[1:2] == [f"10.0.0.{rank % 4}"] for rank in range(4) for line in few.splitlines()) == MOST_ROWS
    )


@given(st.sets(st.integers(0, 40), min_size=1))
def test_spans_name_every_number_once(numbers):
    read = []
    for part in spans(numbers).split(", "):
        first, _, last = part.partition("-")
        read += range(int(first), int(last or first) + 1)
    assert read == sorted(numbers)


@given(st.text(max_size=300))
def test_any_text_of_py_spy_makes_a_report(stack):
    text = report_text(1, verdict_of(0), [view(0)], {0: stack})
    assert "--- rank 0" in text
    short_message(verdict_of(0), [view(0)], {0: stack}, "r")
