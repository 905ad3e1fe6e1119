"""Sources that grow, differ, or change under a run: every process finds the same samples, or says that it cannot."""

import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from prepared_folder import ITEMS, random_block, write_folder, write_version

from onetrain.data import sources as module
from onetrain.data.cursor import Cursor
from onetrain.data.errors import DataError
from onetrain.data.features import FeatureNames
from onetrain.data.manifest import Manifest
from onetrain.data.options import BatchOptions
from onetrain.data.order import Cycle, GlobalOrder, ShuffledOrder
from onetrain.data.sids import SidMap
from onetrain.data.sources import Sources
from onetrain.data.steps import StepBuilder, StreamSpec
from onetrain.data.stream_options import MixtureOptions, StreamOptions

BATCH = BatchOptions(max_context=30)


def folder_of(path, seed=0, versions=0, users=9, name="contents"):
    rng = np.random.default_rng(seed)
    write_folder(path, random_block(rng, rng.integers(5, 20, users)), fingerprint=name)
    for version in range(1, versions + 1):
        lengths = rng.integers(5, 20, 4)
        write_version(path, version, random_block(rng, lengths, train_start=lengths // 2, name=f"v{version}-"))
    return str(path)


def builder_of(folder, stream=None, **changes):
    spec = StreamSpec(folder, stream or StreamOptions(), BATCH, FeatureNames(("item",), ("user",)), 3, 8, 1, 1)
    return StepBuilder(replace(spec, **changes))


def seen(built):
    return [(batch.user["user"].tolist(), batch.target_sid_BTL.tolist()) for batch in built.micro_batches]


def test_threads_that_find_new_versions_at_once_open_each_once(tmp_path, monkeypatch):
    folder = folder_of(tmp_path / "data", versions=3)
    expected = [index.fingerprint for index in Sources(folder, StreamOptions(), BATCH, 0).sources[0].indices]
    monkeypatch.setattr(module, "newest_version", lambda folder, since=0: since)  # opens none by itself
    monkeypatch.setattr(module, "_wait_for", lambda source, version: None)
    sources = Sources(folder, StreamOptions(), BATCH, 0)
    opened, start = sources._open, threading.Barrier(4)

    def slowly(*arguments):
        time.sleep(0.01)
        return opened(*arguments)

    monkeypatch.setattr(sources, "_open", slowly)

    def grow(version):
        start.wait()
        return sources.order(Cursor().updated({"": version}).updates)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(grow, [1, 2, 1, 3]))
    assert [index.fingerprint for index in sources.sources[0].indices] == expected


def test_the_order_of_names_in_the_file_changes_nothing(tmp_path):
    for seed, name in enumerate("ab"):
        folder_of(tmp_path / name, seed, name=name)
    mixture = {"b": MixtureOptions(3, str(tmp_path / "b")), "a": MixtureOptions(2, str(tmp_path / "a"))}
    both = [
        builder_of(str(tmp_path / "a"), StreamOptions(mixture={name: mixture[name] for name in names}))
        for names in ("ab", "ba")
    ]
    for position in (0, 7, 40):
        cursor = Cursor().updated(both[0].sources.newest()).at(position)
        assert seen(both[0].build(cursor, 0)) == seen(both[1].build(cursor, 0))


def test_every_source_of_a_mixture_goes_with_the_folder_that_gives_the_items(tmp_path):
    for name in "abc":
        folder_of(tmp_path / name, name=name)
    main = Manifest.load(tmp_path / "c")
    replace(main, catalogue_fingerprint="others").save(tmp_path / "c")
    mixture = {name: MixtureOptions(1, str(tmp_path / name)) for name in "ab"}
    with pytest.raises(DataError, match=r"/c and .*/a differ in catalogue_fingerprint"):
        builder_of(str(tmp_path / "c"), StreamOptions(mixture=mixture))


def test_other_sids_or_contents_than_the_run_began_with_are_refused(tmp_path):
    folder = folder_of(tmp_path / "data")
    first = builder_of(folder)
    fingerprint = first.sources.manifest.sid_fingerprint
    cursor = first.sources.grown(Cursor(), first.sources.newest())
    assert seen(builder_of(folder, sid_fingerprint=fingerprint).build(cursor, 0)) == seen(first.build(cursor, 0))

    manifest = Manifest.load(folder)
    codes = np.random.default_rng(9).integers(0, 4, (ITEMS, 3))
    sids = SidMap(codes, (4, 4, 4), (), manifest.catalogue_fingerprint)
    sids.save(f"{folder}/sids")
    with pytest.raises(DataError, match="foreign SID map"):
        builder_of(folder, sid_fingerprint=fingerprint)
    manifest.with_sid_fingerprint(sids.fingerprint).save(folder)
    with pytest.raises(DataError, match=f"{sids.fingerprint} now, and this run was started with {fingerprint}"):
        builder_of(folder, sid_fingerprint=fingerprint)

    shutil.rmtree(folder)
    folder_of(tmp_path / "data", seed=1, name="prepared again")
    with pytest.raises(DataError, match=r"data\.prepared up to version 0 has the contents"):
        builder_of(folder).build(cursor, 0)


def test_a_version_of_a_folder_that_was_prepared_again_is_refused(tmp_path):
    folder = folder_of(tmp_path / "data")
    running = builder_of(folder)
    shutil.rmtree(folder)
    folder_of(tmp_path / "data", seed=1, versions=1, name="prepared again")
    with pytest.raises(DataError, match="does not follow from the version 0 that this run reads"):
        running.sources.grown(Cursor(), running.sources.newest())


def test_what_is_skipped_does_not_depend_on_what_was_read_before(tmp_path):
    folder = folder_of(tmp_path / "data", users=40)
    shard = sorted((tmp_path / "data").glob("shard-*.arrow"))[1]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    stream = StreamOptions(damaged="skip")
    going_on, kept = builder_of(folder, stream), []
    cursor = Cursor().updated({"": 0})
    for position in range(0, 160, 8):
        one = going_on.build(cursor.at(position), 0)
        fresh = builder_of(folder, stream).build(cursor.at(position), 0)
        assert seen(one) == seen(fresh)
        assert one.stats.samples + one.stats.skipped == 8
        kept.append(one.stats.samples)
    assert min(kept) < 8


def test_a_source_may_grow_a_thousand_times_within_an_epoch():
    versions = 1500
    sizes = tuple(100 + 2 * version for version in range(versions))
    updates = tuple((version, version) for version in range(versions))
    order = ShuffledOrder(sizes, tuple(map(str, range(versions))), 0, updates)
    mixed = GlobalOrder([order], Cycle((1,)))
    _, ids = mixed.sample_ids(versions - 1, 512)
    assert len(set(ids.tolist())) == 512
