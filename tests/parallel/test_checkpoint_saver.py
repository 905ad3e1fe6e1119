"""Saves in the background: the same bytes as in the foreground, failures that training survives, kills without harm."""

import errno
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from parallel_cases import ADAMW, PARALLEL, SGD, TOTAL_STEPS, global_batch, loss_fn, new_model, share, weight_fn
from safetensors import safe_open
from safetensors.torch import load_file

from onetrain.parallel import checkpoint_saver, snapshot
from onetrain.parallel.checkpoint import load, verify
from onetrain.parallel.checkpoint_header import file_hash
from onetrain.parallel.checkpoint_saver import CheckpointSaver, snapshot_of
from onetrain.parallel.checkpoint_store import FolderStore
from onetrain.parallel.engine import Engine
from onetrain.parallel.errors import DamagedCheckpointError, ParallelError, StorageError
from onetrain.parallel.optimizer_state import gather
from onetrain.parallel.process_group import Ranks
from onetrain.parallel.safetensors_writer import SafetensorsWriter, file_order
from onetrain.parallel.testing import RankFailedError, WorkerPool

FILES = ("model.safetensors", "optimizer.safetensors")


@pytest.fixture(scope="module")
def two() -> Iterator[WorkerPool]:
    with WorkerPool(2) as pool:
        yield pool


def new_engine(ranks: Ranks, stage: int, seed: int = 0, optimizer=ADAMW, **options: object) -> Engine:
    return Engine(new_model(seed), replace(PARALLEL, zero_stage=stage, **options), optimizer, ranks, TOTAL_STEPS)


def train(engine: Engine, steps: int = 1) -> None:
    for step in range(engine.step, engine.step + steps):
        parts = share(global_batch(step), engine.ranks.rank, engine.ranks.world_size, engine.mesh.accumulation_steps)
        engine.train_step(parts, loss_fn, weight_fn)


def test_the_writer_writes_what_the_library_reads(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(3)
    tensors = {
        "flags": torch.rand(3, generator=g) < 0.5,
        "a": torch.randn(5, 3, generator=g),
        "scalar": torch.tensor(7),
        "half": torch.randn(3, generator=g).bfloat16(),
        "none": torch.empty(0, 4),
        "b": torch.randn(2, 2, 2, generator=g),
    }
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    path = tmp_path / "x.safetensors"
    with SafetensorsWriter(path, layout) as writer:
        for name in file_order(layout):
            for piece in tensors[name].flatten().split(4):
                writer.write(piece)
        check = writer.close()
    assert check == {"bytes": path.stat().st_size, "xxh3_128": file_hash(path)}
    read = load_file(path)
    assert read.keys() == tensors.keys()
    assert all(read[name].dtype == t.dtype and torch.equal(read[name], t) for name, t in tensors.items())
    with SafetensorsWriter(path, layout) as writer, pytest.raises(ValueError, match=r"of \d+ bytes"):
        writer.close()


def same_bytes(ranks: Ranks, folder: Path) -> None:
    """In the background while training goes on, in the foreground, and as `gather` sees it."""
    snapshot.CHUNK = 50  # several messages for every piece
    cases = [(stage, {}, ADAMW) for stage in (0, 1, 2, 3)]
    cases += [(1, {"precision": "bf16"}, ADAMW), (3, {"offload_optimizer": True}, ADAMW), (2, {}, SGD)]
    for number, (stage, options, optimizer) in enumerate(cases):
        engine = new_engine(ranks, stage, optimizer=optimizer, **options)
        train(engine, 2)
        saver = CheckpointSaver(engine, FolderStore(folder / str(number)))
        expected = gather(engine)
        saver.save("sync", {"cursor": 2}, "sync")
        saver.save("async", {"cursor": 2})
        train(engine, 3)
        saver.save("later", {})  # into the buffers of the one before
        saver.finish()
        told = saver.outcomes()
        assert [(o.mode, o.step, o.problem) for o in told] == [
            ("sync", 2, None),
            ("async", 2, None),
            ("async", 5, None),
        ]
        if ranks.is_main:
            sync, later, beside = (folder / str(number) / name for name in ("sync", "later", "async"))
            assert [outcome.bytes for outcome in told] == [
                sum(file.stat().st_size for file in path.iterdir()) for path in (sync, beside, later)
            ]
            for name in FILES:
                assert (sync / name).read_bytes() == (beside / name).read_bytes() != (later / name).read_bytes() or (
                    name == FILES[1] and optimizer is SGD
                )
            model, moments = (load_file(beside / name) for name in FILES)
            assert model.pop("seen") > 0
            assert set(model) == set(expected["value"])
            assert all(torch.equal(model[name], t) for name, t in expected.pop("value").items())
            kept = {f"{kind}/{name}": t for kind, tensors in expected.items() for name, t in tensors.items()}
            assert set(moments) == set(kept)
            assert all(torch.equal(moments[name], t) for name, t in kept.items())
            assert verify(beside) is None
        engine.close()


def test_background_and_foreground_write_the_same_bytes(two: WorkerPool, tmp_path: Path) -> None:
    two.run(same_bytes, tmp_path)
    with safe_open(tmp_path / "0" / "async" / FILES[0], "pt") as file:
        assert file.metadata() == {"format": "pt"}


class FullDisk(FolderStore):
    """Has no room for these, which shows in the middle of the optimizer's file."""

    too_large = ("step_00000001", "step_00000002", "step_00000004", "step_00000005", "step_00000006")

    def staging(self, name: str) -> Path:
        folder = super().staging(name)
        if name in self.too_large:
            os.symlink("/dev/full", folder / FILES[1])
        return folder


def failing_saves(ranks: Ranks, folder: Path) -> list[str]:
    engine = new_engine(ranks, 2)
    saver = CheckpointSaver(engine, FullDisk(folder))
    for step in range(4):
        saver.save(f"step_{step:08d}", {})
        train(engine)
    saver.finish()
    told = saver.outcomes()
    if ranks.is_main:
        assert [outcome.problem is None for outcome in told] == [True, False, False, True]
        assert f"[Errno {errno.ENOSPC}]" in told[1].problem
        assert sorted(path.name for path in folder.iterdir()) == ["step_00000000", "step_00000003"]  # nothing half
    for step in (4, 5, 6):
        saver.save(f"step_{step:08d}", {})
    messages = []
    for end in (lambda: saver.save("step_00000007", {}), saver.finish):
        with pytest.raises(ParallelError) as caught:
            end()
        messages.append(str(caught.value))
    engine.close()
    return messages


def test_training_survives_two_failed_saves_and_not_three(two: WorkerPool, tmp_path: Path) -> None:
    for given_up, unfinished in two.run(failing_saves, tmp_path):
        assert given_up.startswith("3 saves in a row have failed")
        assert "step_00000006" in given_up
        assert unfinished.startswith(f"Cannot write checkpoint {tmp_path / 'step_00000006'}")


def slow_writes(seconds: float) -> None:
    write = SafetensorsWriter.write

    def slowly(self: SafetensorsWriter, tensor: torch.Tensor) -> None:
        time.sleep(seconds)
        write(self, tensor)

    SafetensorsWriter.write = slowly  # type: ignore[method-assign]


def closed_while_saving(ranks: Ranks, folder: Path) -> tuple[float, float, list[str], list[str | None]]:
    snapshot.CHUNK, checkpoint_saver.CLOSE_S = 20, 0.2
    engine = new_engine(ranks, 1)
    saver = CheckpointSaver(engine, FolderStore(folder))
    saver.save("old", {}, "sync")
    before, write = threading.active_count(), SafetensorsWriter.write
    slow_writes(0.5)  # half a minute in all
    begun = time.perf_counter()
    saver.save("new", {})
    blocked, begun = time.perf_counter() - begun, time.perf_counter()
    engine.close()
    seconds = time.perf_counter() - begun
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() <= before
    SafetensorsWriter.write = write  # type: ignore[method-assign]
    told = [outcome.problem for outcome in saver.outcomes()]
    return blocked, seconds, sorted(path.name for path in folder.iterdir()) if ranks.is_main else [], told


def test_an_engine_that_is_closed_ends_the_save_under_way(two: WorkerPool, tmp_path: Path) -> None:
    (blocked, seconds, left, told), *_ = two.run(closed_while_saving, tmp_path)
    assert blocked < 3
    assert seconds < 8
    assert left == ["old"]
    assert told == [None, f"Checkpoint {tmp_path / 'new'} was not written: the run ended before it was."]
    assert verify(tmp_path / "old") is None


def agreements(ranks: Ranks, folder: Path) -> list[type[Exception]]:
    """Collectives of training may last three seconds here, and a save five."""
    engine = new_engine(ranks, 1)
    saver = CheckpointSaver(engine, Slow(folder))
    saver.save("first", {}, "sync")
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=3), dist.group.WORLD)
    Slow.seconds = 5.0
    saver.save("slow", {})
    saver.finish()
    Slow.seconds = 0.0
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=120), dist.group.WORLD)
    raised = []
    for error in (StorageError("no answer"), DamagedCheckpointError("cut"), OSError(errno.EIO, "broken")):
        with pytest.raises(ParallelError) as caught:
            saver.agreement.raise_together(error if ranks.rank == 1 else None)
        raised.append(type(caught.value))
        with pytest.raises(ParallelError, match=str(error).replace("[", ".").replace("]", ".")) as caught:
            saver.agreement.from_main(partial(throw, error))
        raised.append(type(caught.value))
    saver.agreement.raise_together(None)
    assert saver.agreement.from_main(lambda: ranks.rank) == 0
    saver.save("closed", {})
    Slow.seconds = 0.3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_saver, "CLOSE_S", 60.0)  # a loaded machine
        engine.close()  # the save ends meanwhile
    problems = [outcome.problem for outcome in saver.outcomes()]
    assert problems == [None] * 3, problems
    return raised


class Slow(FolderStore):
    """Takes its time at the end."""

    seconds = 0.0

    def commit(self, name: str) -> None:
        time.sleep(self.seconds)
        super().commit(name)


def throw(error: Exception) -> None:
    raise error


def test_ranks_wait_for_a_slow_disk_and_share_errors_of_every_type(two: WorkerPool, tmp_path: Path) -> None:
    types = [StorageError, StorageError, DamagedCheckpointError, DamagedCheckpointError, ParallelError, ParallelError]
    assert two.run(agreements, tmp_path) == [types] * 2


def buffers(ranks: Ranks) -> tuple[list[tuple[bool, set[int], set[int], set[int]]], set[int]]:
    """Of saves in turn: copy or not, where snapshot, live tensors and buffers lie; where the buffers lie at last."""
    engine = new_engine(ranks, 1)
    taken = snapshot_of(engine)
    live = lambda: {t.data_ptr() for f in taken.flats for t in f.tensors(engine).values()}  # noqa: E731
    seen = []
    for copy in (True, False, True, False):
        taken.take(copy)
        seen.append((copy, where(taken._host), live(), where(taken._buffers)))
    last = where(taken._buffers)
    engine.close()
    return seen, last


def where(tensors: dict) -> set[int]:
    return {tensor.data_ptr() for tensor in tensors.values()}


def test_buffers_for_copies_are_never_live_tensors(two: WorkerPool) -> None:
    """A copy never goes to where a save in the foreground has found the live tensors."""
    for seen, last in two.run(buffers):
        for copy, noted, live, buffers_then in seen:
            assert noted.isdisjoint(live) if copy else noted <= live
            assert buffers_then.isdisjoint(live)
        assert set().union(*(noted for copy, noted, _, _ in seen if copy)) == last  # used again


def killed_while_saving(ranks: Ranks, folder: Path) -> None:
    engine = new_engine(ranks, 0)
    saver = CheckpointSaver(engine, FolderStore(folder))
    train(engine)
    saver.save("step_00000001", {"cursor": 1})
    saver.finish()
    train(engine)
    slow_writes(0.2)
    saver.save("step_00000001", {"cursor": 2})  # over the old one
    while not list(folder.glob(".*.writing/model.safetensors")):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


def after_the_kill(ranks: Ranks, folder: Path) -> tuple[dict, int]:
    assert verify(folder / "step_00000001") is None
    engine = new_engine(ranks, 2, seed=9)
    state = load(engine, folder / "step_00000001")
    step = engine.step
    CheckpointSaver(engine, FolderStore(folder)).save("step_00000001", {}, "sync")
    engine.close()
    return state, step


def test_a_process_that_is_killed_while_writing_leaves_the_old_checkpoint_whole(
    two: WorkerPool, tmp_path: Path
) -> None:
    with WorkerPool(1) as alone, pytest.raises(RankFailedError, match="died without a traceback"):
        alone.run(killed_while_saving, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2  # the half-written one beside it
    assert two.run(after_the_kill, tmp_path) == [({"cursor": 1}, 1)] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def rank_0_holds_little(ranks: Ranks) -> list[int]:
    """Elements of every tensor that rank 0 has for what others send."""
    snapshot.CHUNK = 30
    engine = new_engine(ranks, 3)
    taken = snapshot_of(engine)
    taken.take(copy=True)
    sizes = []
    if ranks.is_main:
        sizes = [piece.numel() for piece in taken.arriving()]
    else:
        taken.send()
    engine.close()
    return sizes


def test_pieces_arrive_in_bounded_messages(two: WorkerPool) -> None:
    sizes, _ = two.run(rank_0_holds_little)
    assert max(sizes) == 30
    assert sum(sizes) == 3 * sum(parameter.numel() for parameter in new_model(0).parameters())
