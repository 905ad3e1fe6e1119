"""Preflight: each kind of problem is found, with its node and what to do."""

import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from train_cases import changed

from onetrain.data.sids import SidMap
from onetrain.data.stream_options import StreamOptions
from onetrain.launcher import preflight_node
from onetrain.launcher.config import run_folder
from onetrain.launcher.errors import ConfigError
from onetrain.launcher.options import RunConfig
from onetrain.launcher.preflight import legal_world_sizes, preflight, problems
from onetrain.launcher.preflight_node import Seen, look
from onetrain.parallel.checkpoint_header import FORMAT, header_text
from onetrain.parallel.deepspeed_config import check_options
from onetrain.parallel.errors import ParallelError
from onetrain.parallel.options import ParallelOptions


class Nodes:
    """Nodes of a cluster without Ray: each runs the call here, and `spoil` changes what the last one answers."""

    def __init__(self, addresses=("10.0.0.1",), spoil=lambda fn, answer: answer):
        self.addresses, self.spoil = addresses, spoil

    def alive_nodes(self):
        return {f"id of {address}": address for address in self.addresses}

    def run_on(self, node_ids, fn, args=(), timeout_s=30.0):
        answers = {node_id: fn(*args) for node_id in node_ids}
        last = f"id of {self.addresses[-1]}"
        if last in answers:
            answers[last] = self.spoil(fn, answers[last])
        return answers


TWO = ("10.0.0.1", "10.0.0.2")


@pytest.fixture
def job(prepared_job, tmp_path):
    """The tiny job with prepared data of its own."""
    shutil.copytree(prepared_job.data.prepared, tmp_path / "prepared")
    return changed(prepared_job, storage_path=str(tmp_path / "runs"), data__prepared=str(tmp_path / "prepared"))


def failures(config, nodes=None):
    checks = preflight(config, nodes or Nodes())
    assert all(check.detail and bool(check.fix) == (check.state != "ok") for check in checks), checks
    return {check.name: check for check in checks if check.state == "fail"}


def the_only(found):
    (check,) = found.values()
    return check


def spoiled(**values):
    return Nodes(TWO, lambda fn, answer: replace(answer, **values) if isinstance(answer, Seen) else answer)


def test_a_healthy_job_has_no_problem_and_leaves_nothing(job):
    started = time.monotonic()
    checks = preflight(job, Nodes(TWO))
    assert time.monotonic() - started < 8  # imports of the first call, on a busy machine
    assert problems(checks) == []
    names = {check.name: check for check in checks}
    assert {"mesh", "memory", "versions", "clock", "shared memory", "room for checkpoints"} <= names.keys()
    assert names["versions"].detail == "those of the supervisor (2 nodes)"
    assert list(run_folder(job).iterdir()) == []


def test_the_node_part_is_light(job):
    """A node's agent does not wait for torch."""
    import subprocess
    import sys

    code = "import sys, onetrain.launcher.preflight_node; assert not {'torch', 'ray', 'deepspeed'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unwritable_path(job):
    Path(job.storage_path).parent.mkdir(exist_ok=True)
    Path(job.storage_path).write_text("a file where the folder should be")
    found = failures(job)
    assert set(found) == {f"folder {run_folder(job)}", f"folder {run_folder(job)} on 10.0.0.1"}


def test_rights_that_only_the_attempt_to_write_shows(job, monkeypatch):
    """As of a network file system that maps root to nobody."""
    real = Path.write_text
    calls = []

    def refuse_on_the_node(path, *args, **kwargs):
        if ".preflight-" in path.name:
            calls.append(path)
            if len(calls) > 1:  # the first is the supervisor's
                raise PermissionError(13, "Permission denied")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", refuse_on_the_node)
    check = the_only(failures(job))
    assert check.name == f"folder {run_folder(job)} on 10.0.0.1"
    assert "Permission denied" in check.detail


def test_storage_that_is_not_shared(job, monkeypatch):
    monkeypatch.setattr(preflight_node, "SEEN_WITHIN_S", 0.1)
    folder = str(run_folder(job))

    def elsewhere(fn, answer):
        """The second node has a folder of its own under this path."""
        if fn is not look:
            return answer
        return look(preflight_node.Look((folder,), (), StreamOptions(), ((f"{folder}/.preflight-other", "text"),)))

    check = the_only(failures(job, Nodes(TWO, elsewhere)))
    assert check.name == f"shared {folder} on 10.0.0.2"
    assert "not the same folder" in check.detail


def test_other_versions(job):
    here = preflight_node.versions()
    check = the_only(failures(job, spoiled(versions=here | {"torch": "1.0"})))
    assert check.name == "version of torch on 10.0.0.2"
    assert check.detail == f"1.0, the supervisor has {here['torch']}"
    check = the_only(failures(job, spoiled(versions=here | {"code": "0"})))
    assert check.name == "code of onetrain on 10.0.0.2"
    builds = here | {"torch": here["torch"].partition("+")[0] + "+cu130", "Python": "3.11.99"}
    checks = preflight(job, spoiled(versions=builds))
    assert problems(checks) == []
    assert {c.name for c in checks if c.state == "warn" and "version" in c.name} == {
        "version of torch on 10.0.0.2",
        "version of Python on 10.0.0.2",
    }


def test_code_that_is_edited_meanwhile_is_not_compared(job, monkeypatch):
    codes = iter("abcdef")
    monkeypatch.setattr(preflight_node, "_code", lambda: next(codes))
    assert failures(job) == {}


def test_a_missing_a_cut_and_a_foreign_shard(job):
    shard = Path(job.data.prepared) / "shard-00000.arrow"
    content = shard.read_bytes()
    name = f"prepared data {job.data.prepared} on 10.0.0.1"
    for damage in (lambda: shard.unlink(), lambda: shard.write_bytes(content[:-1])):
        damage()
        found = failures(job)
        assert set(found) == {"prepared data", name}
        assert "shard-00000.arrow" in found[name].detail
    shard.write_bytes(b"another file"[:6] + content[6:])
    check = the_only(failures(job))  # the size is right
    assert "no Arrow file" in check.detail
    skipping = replace(job, stream=StreamOptions(damaged="skip"))
    assert problems(preflight(skipping, Nodes())) == []


def test_no_data(job):
    shutil.rmtree(job.data.prepared)
    found = failures(job)
    assert "onetrain prepare" in found["prepared data"].fix
    assert f"prepared data {job.data.prepared} on 10.0.0.1" in found


def test_remote_data_and_storage(job):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(job.data.prepared, "/bucket/prepared", recursive=True)
    url = "memory://bucket/prepared"
    assert preflight_node._readable(url, StreamOptions()).state == "ok"
    memory.pipe_file("/bucket/prepared/shard-00000.arrow", b"short")
    found = preflight_node._readable(url, StreamOptions())
    assert found.state == "fail"
    assert f"{url}/shard-00000.arrow has 5 bytes" in found.detail
    assert preflight_node._write_remote("memory://bucket/runs").state == "ok"
    assert memory.ls("/bucket/runs") == []
    assert preflight_node._write_remote("nothing://bucket").state == "fail"


def test_sids_of_another_map(job):
    folder = f"{job.data.prepared}/sids"
    sids = SidMap.load(folder)
    codes_IL = sids.codes_IL.copy()
    codes_IL[0, 0] = (codes_IL[0, 0] + 1) % sids.sizes[0]
    replace(sids, codes_IL=codes_IL).save(folder)
    found = failures(job)
    assert set(found) == {"semantic IDs", f"prepared data {job.data.prepared} on 10.0.0.1"}


def test_a_node_with_an_old_copy_of_the_data(job):
    contents = {job.data.prepared: "data 1 with SIDs 2"}
    check = the_only(failures(job, spoiled(fingerprints=contents)))
    assert check.name == f"contents of {job.data.prepared} on 10.0.0.2"


def write_header(folder, sid_fingerprint):
    folder.mkdir(parents=True, exist_ok=True)
    header = {
        "format": FORMAT,
        "step": 10,
        "optimizer": "adamw",
        "files": {},
        "state": {"sid_fingerprint": sid_fingerprint},
    }
    (folder / "state.json").write_text(header_text(header))


@pytest.mark.parametrize("place", ["the run's", "checkpoint_path", "warm_start"])
def test_a_checkpoint_of_other_sids(job, tmp_path, place):
    folder = run_folder(job) / "checkpoints" / "step_00000010"
    if place != "the run's":
        folder = tmp_path / "elsewhere" / "step_00000010"
        path = folder if place == "warm_start" else folder.parent
        job = changed(job, **{f"train__{place}": str(path)})
    ours = SidMap.load(f"{job.data.prepared}/sids").fingerprint
    write_header(folder, ours)
    assert failures(job) == {}
    write_header(folder, "others")
    check = the_only(failures(job))
    assert check.name == "checkpoint"
    assert ours in check.detail
    assert "others" in check.detail


def test_a_damaged_newest_checkpoint_is_told_and_passed_over(job):
    folder = run_folder(job) / "checkpoints"
    ours = SidMap.load(f"{job.data.prepared}/sids").fingerprint
    write_header(folder / "step_00000010", ours)
    write_header(folder / "step_00000020", ours)
    (folder / "step_00000020" / "state.json").write_text("{")
    (check,) = [check for check in preflight(job, Nodes()) if check.name == "checkpoint"]
    assert check.state == "warn"
    assert "step_00000020" in check.detail
    assert "step_00000010 is used" in check.detail
    (folder / "step_00000010" / "state.json").write_text("{")
    assert "none of the run's checkpoints" in the_only(failures(job)).detail


@pytest.mark.parametrize(("away", "state"), [(-4.0, "ok"), (6.0, "fail"), (-6.0, "fail")])
def test_clocks(job, away, state):
    nodes = Nodes(TWO, lambda fn, answer: answer + away if fn is time.time else answer)
    found = failures(job, nodes)
    assert set(found) == ({"clock on 10.0.0.2"} if state == "fail" else set())
    if found:
        assert f"6 s {'ahead of' if away > 0 else 'behind'} the supervisor's" in found["clock on 10.0.0.2"].detail


@pytest.mark.parametrize("answer", [TimeoutError("the node did not answer within 30 s"), ImportError("no onetrain")])
def test_a_node_that_does_not_answer(job, answer):
    check = the_only(failures(job, Nodes(TWO, lambda fn, _: answer)))
    assert check.name == "node 10.0.0.2"
    assert str(answer) in check.detail


def test_a_disk_without_room_for_two_checkpoints(job):
    check = the_only(failures(job, spoiled(free={"/runs": 1000})))
    assert check.name == "room for checkpoints on 10.0.0.2"


def test_memory_counts_with_gpus(job):
    tight = changed(job, plan__device_memory_gib=0.001, plan__reserve_gib=0.0)
    assert [c.state for c in preflight(tight, Nodes()) if c.name == "memory"] == ["warn"]
    on_gpus = changed(tight, cluster__gpus_per_worker=1.0)
    assert set(failures(on_gpus)) == {"memory"}


def test_a_mesh_that_cannot_be(job):
    found = failures(changed(job, cluster__workers=3, parallel__context_parallel=2))
    assert set(found) == {"mesh"}
    assert "cluster.workers 3" in found["mesh"].detail


@given(
    workers=st.integers(1, 12),
    fewest=st.none() | st.integers(1, 12),
    tensor=st.sampled_from([1, 2, 3]),
    batch=st.integers(1, 16),
)
def test_legal_world_sizes_are_those_that_the_mesh_takes(workers, fewest, tensor, batch):
    config = changed(
        RunConfig("any"),
        cluster__workers=workers,
        recovery__min_workers=fewest,
        parallel=ParallelOptions(tensor_parallel=tensor, global_batch_size=batch),
    )

    def legal(size):
        try:
            check_options(config.parallel, size, config.model)
        except ParallelError:
            return False
        return True

    if not legal(workers) or (fewest or 1) > workers:
        with pytest.raises(ConfigError, match=r"cluster\.workers"):
            legal_world_sizes(config)
        return
    expected = [size for size in range(fewest or workers, workers + 1) if legal(size)]
    assert list(legal_world_sizes(config)) == expected[::-1]


def test_fewest_ranks_that_are_no_legal_size(job):
    odd = changed(
        job, cluster__workers=4, recovery__min_workers=1, parallel__zero_stage=1, parallel__global_batch_size=4
    )
    assert legal_world_sizes(odd)[-1] == 1
    pairs = changed(odd, parallel__tensor_parallel=2)
    assert legal_world_sizes(pairs) == (4, 2)
    (mesh,) = [check for check in preflight(pairs, Nodes()) if check.name == "mesh"]
    assert (mesh.state, "set recovery.min_workers to 2" in mesh.fix) == ("warn", True)
