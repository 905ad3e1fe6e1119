"""Files beside the data are what was written, or are made again."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from random_shards import random_data

from onetrain.data import samples, sidecar
from onetrain.data.errors import DataError
from onetrain.data.options import BatchOptions
from onetrain.data.samples import SampleIndex
from onetrain.data.shards import ShardReader
from onetrain.data.sidecar import DESCRIPTION


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-8])


def foreign(path):
    path.write_text(json.dumps({"samples": 3, "skipped_shards": []}))


class Table:
    """Writes the same numbers each time."""

    def __init__(self, folder):
        self.folders, self.built = [folder / "a", folder / "b"], 0

    def build(self, folder):
        self.built += 1
        sidecar.append(folder / "numbers.bin", np.arange(100))
        (folder / "empty.bin").touch()
        return {"count": 100}

    def open(self):
        folder, description = sidecar.sidecar(self.folders, "table", self.build)
        assert description == {"count": 100}
        assert sidecar.mapped(folder / "numbers.bin", np.int64).tolist() == list(range(100))
        return folder


DAMAGES = [
    ("numbers.bin", flip),
    ("numbers.bin", truncate),
    ("numbers.bin", Path.unlink),
    ("empty.bin", Path.unlink),
    (DESCRIPTION, flip),
    (DESCRIPTION, truncate),
    (DESCRIPTION, foreign),
    (DESCRIPTION, Path.unlink),
]


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_what_is_damaged_is_made_again_once(tmp_path, caplog, name, damage):
    table = Table(tmp_path)
    folder = table.open()
    assert (table.open(), table.built) == (folder, 1)
    damage(folder / name)
    with ThreadPoolExecutor(4) as threads:  # all may build, and none sees the damaged one
        assert {opened.result() for opened in [threads.submit(table.open) for _ in range(4)]} == {folder}
    assert "is damaged, or of an older format, and is made again" in caplog.text
    built = table.built
    assert (table.open(), table.built) == (folder, built)
    assert {path.name for path in folder.parent.iterdir()} == {"table", ".table.lock"}


def test_what_another_has_made_again_meanwhile_stays(tmp_path, monkeypatch):
    table, read = Table(tmp_path), sidecar._read
    folder = table.open()
    looked = []  # the first look was at the damaged one
    monkeypatch.setattr(sidecar, "_read", lambda path: None if not looked and not looked.append(1) else read(path))
    inode = folder.stat().st_ino
    assert (table.open().stat().st_ino, table.built) == (inode, 1)


def test_a_damaged_one_that_cannot_be_removed_is_left_for_another_place(tmp_path, monkeypatch):
    table, rename = Table(tmp_path), os.rename
    first = table.open()
    flip(first / "numbers.bin")

    def refused(source, target):
        if str(source).startswith(str(first)):
            raise PermissionError(13, "Permission denied")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refused)
    assert table.open().parent == table.folders[1]
    assert (table.open().parent, table.built) == (table.folders[1], 3)  # a build in the first place was of no use


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced, rename = [], os.rename
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.readlink(f"/proc/self/fd/{number}")))
    before = []
    monkeypatch.setattr(os, "rename", lambda *paths: before.extend([*synced, "renamed"]) or rename(*paths))
    folder = Table(tmp_path).open()
    names = [Path(path).name for path in before]
    assert names[:3] == ["empty.bin", "numbers.bin", DESCRIPTION]
    assert names[3].startswith(".table-")
    assert names[4:] == ["renamed"]
    assert synced[4:] == [str(folder.parent)]


@pytest.mark.parametrize("by_time", [False, True])
@pytest.mark.parametrize("share_context", ["request", "user"])
def test_a_damaged_index_numbers_the_same_samples_again(tmp_path, by_time, share_context):
    data = random_data(11, users=20)
    shutil.copytree(data.folder, tmp_path / "copy", ignore=shutil.ignore_patterns("index"))
    options = BatchOptions(max_context=5, share_context=share_context)

    def numbers():
        index = SampleIndex(ShardReader(tmp_path / "copy", data.manifest), "train", options, by_time=by_time)
        rows = index.rows(np.arange(len(index)))
        return [rows.row_B.tolist(), rows.start_B.tolist(), rows.stop_B.tolist(), index.by_time.tolist()]

    expected = numbers()
    files = sorted(path.name for path in (tmp_path / "copy").glob("index/*/*.bin"))
    assert files == ["by_time.bin"] * by_time + ["ends.bin"] + ["samples.bin"] * (share_context == "user")
    for name in files:
        flip(next((tmp_path / "copy").glob(f"index/*/{name}")))
        assert numbers() == expected


def test_an_index_of_another_number_of_samples_is_an_error(tmp_path, monkeypatch):
    data, build = random_data(12), samples.build_table
    shutil.copytree(data.folder, tmp_path / "copy", ignore=shutil.ignore_patterns("index"))

    def more(*args, **kwargs):
        description = build(*args, **kwargs)
        return description | {"samples": description["samples"] + 1}

    monkeypatch.setattr(samples, "build_table", more)
    with pytest.raises(DataError, match=r"index/train-.* numbers .* Remove it"):
        SampleIndex(ShardReader(tmp_path / "copy", data.manifest), "train", BatchOptions())
