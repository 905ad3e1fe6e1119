import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from onetrain.cluster.options import ClusterOptions
from onetrain.data.options import DataOptions, SimulatorOptions, SourceOptions
from onetrain.data.prepare import prepare
from onetrain.launcher import doctor
from onetrain.launcher.doctor import checks
from onetrain.launcher.options import RunConfig, TrackingOptions, TrainOptions
from onetrain.launcher.tokenize import tokenize
from onetrain.model.options import TokenizerOptions
from onetrain.parallel.options import ParallelOptions

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(autouse=True)
def no_account(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def config(tmp_path):
    shop = SimulatorOptions(users=60, items=120, events_per_user=9, themes=12, embedding_dim=8)
    source = SourceOptions(reader="simulator", events=str(tmp_path / "logs"), simulator=shop)
    return RunConfig(
        name="job",
        storage_path=str(tmp_path / "runs"),
        data=DataOptions(prepared=str(tmp_path / "prepared"), source=source),
        tokenizer=TokenizerOptions(codebook=(4, 4, 4)),
        tracking=TrackingOptions(wandb="offline"),
        cluster=ClusterOptions(workers=1),
    )


def named(found):
    assert len({check.name for check in found}) == len(found)
    assert all(check.detail and bool(check.fix) == (check.state != "ok") for check in found)
    return {check.name: check for check in found}


def test_the_tested_versions_are_the_pinned_ones():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line)
    assert {name: pinned[name] for name in doctor.TESTED} == doctor.TESTED


@pytest.mark.slow
def test_this_machine_can_do_everything():
    found = named(checks())
    assert {"python", "libraries", "device", "gloo", "deepspeed", "ray", "shared memory", "wandb"} <= set(found)
    assert [check for check in found.values() if check.state == "fail"] == []
    assert "local Ray started" in found["ray"].detail


def test_a_job_whose_data_are_still_to_be_made(config):
    found = named(checks(config, quick=True))
    assert (found["prepared data"].state, found["prepared data"].fix) == ("warn", "onetrain prepare")
    prepare(config.data)
    found = named(checks(config, quick=True))
    assert found["prepared data"].state == "ok"
    assert "60 users" in found["prepared data"].detail
    assert (found["semantic IDs"].state, found["semantic IDs"].fix) == ("warn", "onetrain tokenize")
    tokenize(config)
    assert named(checks(config, quick=True))["semantic IDs"].state == "ok"
    assert not Path(config.storage_path).exists()


def test_damaged_data_are_found(config, monkeypatch):
    monkeypatch.setattr(doctor, "_ray", lambda options: doctor.Check("ray", "ok", "not started"))
    monkeypatch.setattr(doctor, "_deepspeed", lambda: doctor.Check("deepspeed", "ok", "not imported"))
    prepare(config.data)
    assert named(checks(config))["prepared data"].state == "ok"
    shard = Path(config.data.prepared) / "shard-00000.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert named(checks(config, quick=True))["prepared data"].state == "ok"  # the size is right
    found = named(checks(config))["prepared data"]
    assert found.state == "fail"
    assert "shard-00000.arrow is damaged" in found.detail
    shard.write_bytes(content[:-10])
    assert named(checks(config, quick=True))["prepared data"].state == "fail"


def test_the_sids_of_other_data_are_found(config, tmp_path):
    other = replace(config, data=replace(config.data, prepared=str(tmp_path / "other")))
    for job in (config, other):
        prepare(job.data)
    tokenize(config)
    tokenize(replace(other, seed=1))
    (tmp_path / "prepared" / "sids").rename(tmp_path / "sids")
    (tmp_path / "other" / "sids").rename(tmp_path / "prepared" / "sids")
    found = named(checks(config, quick=True))["semantic IDs"]
    assert found.state == "fail"
    assert "foreign SID map" in found.detail


def test_a_world_size_that_does_not_fit(config):
    wrong = replace(config, cluster=ClusterOptions(workers=3), parallel=ParallelOptions(global_batch_size=2))
    found = named(checks(wrong, quick=True))["mesh"]
    assert found.state == "fail"
    assert "global_batch_size 2" in found.detail
    assert "3 ranks" in found.detail
    assert named(checks(config, quick=True))["mesh"].state == "ok"


def test_too_many_threads_and_gpus(config):
    many = replace(config, train=TrainOptions(threads_per_worker=10_000))
    assert named(checks(many, quick=True))["cores"].state == "warn"
    gpus = torch.cuda.device_count() + 1
    found = named(checks(replace(config, cluster=ClusterOptions(workers=1, gpus_per_worker=gpus)), quick=True))
    assert found["device"].state == "fail"


def test_a_ray_address_where_nothing_answers(config):
    found = doctor._ray(ClusterOptions(address="127.0.0.1:9"))
    assert found.state == "fail"
    assert "no Ray answers" in found.detail


def test_a_folder_that_cannot_be_made(config, tmp_path):
    (tmp_path / "runs").write_text("a file where the folder should be")
    found = named(checks(config, quick=True))
    assert found[f"folder {tmp_path / 'runs' / 'job'}"].state == "fail"
    assert found[f"folder {tmp_path / 'prepared'}"].state != "fail"


@pytest.mark.parametrize(("free", "state"), [(2**20, "fail"), (2 * 2**30, "warn"), (2**40, "ok")])
def test_disk_space(config, monkeypatch, free, state):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: usage(2**41, 0, free))
    found = named(checks(config, quick=True))
    assert found[f"folder {config.data.prepared}"].state == state
    assert found["shared memory"].state == ("warn" if state == "fail" else "ok")


def test_other_versions(monkeypatch):
    installed = {**doctor.TESTED, "torch": "2.13.0+cu130"}
    monkeypatch.setattr(doctor, "package_version", installed.get)
    assert named(checks(quick=True))["libraries"].state == "ok"
    installed["ray"] = "2.99.0"
    found = named(checks(quick=True))["libraries"]
    assert (found.state, found.detail) == ("warn", f"ray 2.99.0 (tested {doctor.TESTED['ray']})")
    del installed["duckdb"]
    found = named(checks(quick=True))["libraries"]
    assert (found.state, found.detail) == ("fail", "not installed: duckdb")


@pytest.mark.parametrize(("version", "state"), [((3, 10), "fail"), ((3, 11), "ok"), ((3, 14), "warn")])
def test_other_pythons(monkeypatch, version, state):
    monkeypatch.setattr(sys, "version_info", (*version, 0, "final", 0))
    assert doctor._python().state == state


def test_a_network_interface_that_gloo_lacks(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")
    assert doctor._gloo().state == "fail"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    assert doctor._gloo().state == "ok"


def test_online_without_an_account(config):
    online = replace(config, tracking=TrackingOptions(wandb="online"))
    assert doctor._wandb(online.tracking.wandb).state == "fail"
    assert "offline" in doctor._wandb("auto").detail
