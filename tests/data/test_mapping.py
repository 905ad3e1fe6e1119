"""Mapped files hold their values and no descriptor."""

import os
import resource

import numpy as np
import pytest
from random_shards import random_data

from onetrain.data.mapping import map_file
from onetrain.data.options import BatchOptions
from onetrain.data.samples import SampleIndex
from onetrain.data.shards import ShardReader


def descriptors():
    return len(os.listdir("/proc/self/fd"))


def mappings(path):
    with open("/proc/self/maps", encoding="utf-8") as maps:
        return sum(str(path) in line for line in maps)


@pytest.mark.parametrize("dtype", ["u1", "<i8", np.dtype([("a", "<i4"), ("b", "<i8")], align=True)])
@pytest.mark.parametrize("records", [0, 1, 1000])
def test_values_are_those_of_the_file(tmp_path, dtype, records):
    path, before = tmp_path / "values.bin", descriptors()
    content = np.random.default_rng(records).bytes(records * np.dtype(dtype).itemsize)
    path.write_bytes(content)
    values = map_file(path, dtype)
    assert (len(values), values.dtype, values.tobytes()) == (records, dtype, content)
    assert not values.flags.writeable
    assert descriptors() == before
    path.unlink()  # a view goes on
    tail = values[records // 2 :]
    del values
    assert tail.tobytes() == content[records // 2 * np.dtype(dtype).itemsize :]
    assert mappings(path) == (records > 0)
    del tail
    assert mappings(path) == 0


def test_what_holds_no_whole_values_is_an_error(tmp_path):
    (tmp_path / "values.bin").write_bytes(b"123")
    with pytest.raises(ValueError, match="size"):
        map_file(tmp_path / "values.bin", np.int32)
    with pytest.raises(FileNotFoundError):
        map_file(tmp_path / "missing.bin")


def test_more_shards_than_descriptors_are_open_at_once():
    data = random_data(3, users=60)
    shards = len(data.manifest.shards)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare = 10  # the lowest free numbers are taken
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + spare, hard))
    try:
        readers = [ShardReader(data.folder, data.manifest) for _ in range(30)]
        indices = [SampleIndex(reader, "train", BatchOptions(request_by="timestamp")) for reader in readers]
        before = descriptors()
        for reader in readers:
            assert [len(reader.user(row)) for row in range(reader.n_users)] == [len(user) for user in data.users]
        assert descriptors() == before
        assert len(readers) * shards + len(indices) > 3 * spare
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
