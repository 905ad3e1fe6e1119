"""Stores of checkpoints: a folder, and other storage through fsspec, keep the same promises."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
import xxhash

from onetrain.parallel.checkpoint import verify
from onetrain.parallel.checkpoint_header import FORMAT, header_text
from onetrain.parallel.checkpoint_store import (
    CheckpointStore,
    FolderStore,
    RemoteStore,
    open_checkpoint,
    open_store,
    step_name,
)
from onetrain.parallel.errors import DamagedCheckpointError, ParallelError, StorageError

FILES = ("model.safetensors", "optimizer.safetensors")


@pytest.fixture(params=["folder", "memory", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[CheckpointStore]:
    memory = fsspec.filesystem("memory")
    url = {"folder": str(tmp_path / "place"), "memory": "memory://bucket/run", "file": f"file://{tmp_path}/place"}
    yield open_store(url[request.param], str(tmp_path / "cache"))
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]


def put(store: CheckpointStore, step: int, content: bytes = b"x" * 1000) -> str:
    name = step_name(step)
    folder = store.staging(name)
    checks = {}
    for file in FILES:
        (folder / file).write_bytes(content + file.encode())
        checks[file] = {"bytes": len(content) + len(file)}
        checks[file]["xxh3_128"] = xxhash.xxh3_128_hexdigest(content + file.encode())
    (folder / "state.json").write_text(header_text({"format": FORMAT, "step": step, "state": {}, "files": checks}))
    store.commit(name)
    return name


def raw(store: CheckpointStore, name: str) -> tuple[fsspec.AbstractFileSystem, str]:
    return fsspec.core.url_to_fs(store.where(name))


def test_what_is_put_is_there_and_can_be_fetched_listed_and_removed(store: CheckpointStore) -> None:
    assert (store.names(), store.latest(), store.candidates()) == ([], None, [])
    for step in (9, 10, 100):
        put(store, step, b"%d" % step * 50)
    assert store.names() == store.candidates() == [step_name(step) for step in (9, 10, 100)]
    assert store.latest() == step_name(100)
    for step in (100, 9, 100):
        folder = store.fetch(step_name(step))
        assert (folder / FILES[0]).read_bytes() == b"%d" % step * 50 + FILES[0].encode()
        assert store.header(step_name(step))["step"] == json.loads((folder / "state.json").read_text())["step"] == step
        assert store.problem(step_name(step)) is None
    store.remove(step_name(9))
    assert store.names() == [step_name(10), step_name(100)]
    assert not store.exists(step_name(9))
    other, name = open_checkpoint(store.where(step_name(10)) + "/")
    assert name == step_name(10)
    assert other.exists(name)


def test_a_second_one_of_that_name_takes_its_place(store: CheckpointStore) -> None:
    name = put(store, 5)
    store.fetch(name)  # a copy that must not be taken for the new one
    folder = store.staging(name)
    (folder / FILES[0]).write_bytes(b"new")
    checks = {FILES[0]: {"bytes": 3, "xxh3_128": xxhash.xxh3_128_hexdigest(b"new")}}
    (folder / "state.json").write_text(header_text({"format": FORMAT, "step": 5, "state": {}, "files": checks}))
    store.discard(name)
    assert len(store.header(name)["files"]) == 2
    put(store, 5, b"again")
    assert (store.fetch(name) / FILES[0]).read_bytes() == b"again" + FILES[0].encode()


def test_retention(store: CheckpointStore) -> None:
    for step in (10, 20, 30, 40, 50, 60, 70):
        put(store, step)
    assert store.prune(2, {step_name(10)}, keep_every=30) == [step_name(step) for step in (20, 40, 50)]
    assert store.names() == [step_name(step) for step in (10, 30, 60, 70)]
    assert store.prune(1) == [step_name(step) for step in (10, 30, 60)]


def test_damage_is_named_and_set_aside(store: CheckpointStore) -> None:
    name = put(store, 7)
    system, path = raw(store, name)
    system.pipe_file(f"{path}/{FILES[1]}", b"short")
    assert store.problem(name) == f"{FILES[1]} has 5 bytes instead of 1021"
    system.pipe_file(f"{path}/{FILES[1]}", b"y" * 1021)
    assert store.problem(name) is None  # sizes alone
    if isinstance(store, RemoteStore):
        with pytest.raises(DamagedCheckpointError, match=r"optimizer\.safetensors does not match its checksum"):
            store.fetch(name)
        assert not list(store.cache.glob("copies/*/*"))
    aside = store.set_aside(name)
    assert ".damaged" in aside
    assert (store.names(), store.exists(name)) == ([], False)
    assert store.damaged() == [name if isinstance(store, RemoteStore) else f"{name}.damaged"]
    put(store, 7)
    assert store.names() == [name]
    system.pipe_file(f"{path}/state.json", b'{"format": 1')
    with pytest.raises(DamagedCheckpointError, match=r"state\.json is damaged"):
        store.header(name)
    if isinstance(store, FolderStore):
        assert store.set_aside(name) == f"{aside}2"


def test_state_json_has_a_checksum_of_its_own(store: CheckpointStore) -> None:
    name = put(store, 7)
    system, path = raw(store, name)
    content = system.cat_file(f"{path}/state.json")
    assert content.count(b'"step": 7') == 1
    system.pipe_file(f"{path}/state.json", json.dumps(json.loads(content)).encode())  # laid out otherwise
    assert store.header(name)["step"] == 7
    for change in ((b'"step": 7', b'"step": 6'), (b'"format": 2', b'"format": 3'), (b'"xxh3_128"', b'"xxh3_129"')):
        system.pipe_file(f"{path}/state.json", content.replace(*change))
        with pytest.raises(DamagedCheckpointError, match=r"state\.json is damaged"):
            store.header(name)
    older = {key: value for key, value in json.loads(content).items() if key != "xxh3_128"} | {"format": 1}
    system.pipe_file(f"{path}/state.json", json.dumps(older).encode())
    if isinstance(store, FolderStore):
        with pytest.raises(ParallelError, match="has format 1; this version reads 2") as caught:
            verify(store.fetch(name))
        assert not isinstance(caught.value, DamagedCheckpointError)


def test_only_a_checkpoint_is_replaced(store: CheckpointStore) -> None:
    name = put(store, 3)
    assert store.taken(name)
    assert not store.taken(step_name(4))
    system, path = raw(store, step_name(4))
    system.makedirs(path)
    assert not store.taken(step_name(4))
    put(store, 4)
    if isinstance(store, FolderStore):
        (store.folder / step_name(5)).mkdir()
        (store.folder / step_name(5) / "thesis.txt").write_text("years of work")
        with pytest.raises(ParallelError, match="is no checkpoint"):
            put(store, 5)
        assert (store.folder / step_name(5) / "thesis.txt").exists()


def test_crashes_leave_nothing_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FolderStore(tmp_path)
    for step in (1, 2, 3, 4):
        put(store, step)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, ignore_errors=False: None if ignore_errors else killed())
        with pytest.raises(KeyboardInterrupt):
            store.remove(step_name(1))
    assert store.candidates() == [step_name(step) for step in (2, 3, 4)]
    (tmp_path / step_name(2)).rename(tmp_path / f".{step_name(2)}.old")  # as between the two renames of `commit`
    shutil.copytree(tmp_path / step_name(3), tmp_path / f".{step_name(3)}.old")  # as after them
    store.staging(step_name(5))
    assert len(list(tmp_path.iterdir())) == 6
    store.recover()
    store.sweep()
    assert sorted(path.name for path in tmp_path.iterdir()) == [step_name(step) for step in (2, 3, 4)]
    assert all(store.problem(name) is None for name in store.names())


def test_state_json_goes_last_and_is_deleted_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RemoteStore(f"file://{tmp_path}/place", tmp_path / "cache")
    written, put_file = [], store.system.put_file

    def noted(source: str, target: str, **options: object) -> None:
        written.append(Path(target).name)
        assert not store.exists(step_name(1))
        put_file(source, target, **options)

    monkeypatch.setattr(store.system, "put_file", noted)
    name = put(store, 1)
    assert written == [*FILES, "state.json"]

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("locked")

    monkeypatch.setattr(store.system, "rm", refuse)
    with pytest.raises(ParallelError, match="cannot be deleted"):
        store.remove(name)
    assert not store.exists(name)
    assert (tmp_path / "place" / name / FILES[0]).exists()


def test_storage_that_stumbles_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onetrain.parallel.checkpoint_store.PAUSES_S", (0.0, 0.0, 0.0))
    store = RemoteStore(f"file://{tmp_path}/place", tmp_path / "cache")
    failures = [2]

    def stumbling(action: Callable) -> Callable:
        def call(*arguments: object, **options: object) -> object:
            if failures[0] > 0:
                failures[0] -= 1
                raise ConnectionError("reset by peer")
            return action(*arguments, **options)

        return call

    monkeypatch.setattr(store.system, "put_file", stumbling(store.system.put_file))
    monkeypatch.setattr(store.system, "get_file", stumbling(store.system.get_file))
    name = put(store, 1)
    failures[0] = 3
    assert (store.fetch(name) / FILES[0]).exists()
    shutil.rmtree(tmp_path / "cache")
    failures[0] = 4
    with pytest.raises(StorageError, match=r"cannot be read \(ConnectionError: reset by peer\)") as caught:
        store.fetch(name)
    assert caught.value.transient


def test_an_unknown_kind_of_url_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ParallelError, match="cannot be opened"):
        open_store("nowhere://bucket/run", str(tmp_path))
