"""What the supervisor is told of a configuration."""

import pytest
from train_cases import changed

from onetrain.launcher.errors import ConfigError
from onetrain.launcher.supervised import has_address, job_of
from onetrain.launcher.train import train


def test_a_job_is_what_the_configuration_says(tiny, tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = changed(tiny, cluster__workers=6, parallel__expert_parallel=2, model__moe__experts=4)
    config = changed(config, recovery__min_workers=3, train__threads_per_worker=2)
    job = job_of(config)
    assert job.sizes == (6, 4)  # whole groups of experts, not below the fewest
    assert (job.function, job.arguments, job.threads_per_worker) == (train, (config,), 2)
    assert job.folder == tmp_path / "runs" / "job"
    assert job.digest == job_of(changed(config)).digest != job_of(changed(config, train__steps=7)).digest
    assert not has_address(config)
    assert has_address(changed(config, cluster__address="auto"))


def test_progress_is_the_newest_checkpoint(tiny):
    job = job_of(tiny)
    assert job.checkpointed() == 0
    for step in (8, 40):
        folder = job.folder / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text("{}")
    assert job.checkpointed() == 40


def test_a_world_that_cannot_be_is_refused(tiny):
    with pytest.raises(ConfigError, match=r"cluster\.workers 3"):
        job_of(changed(tiny, cluster__workers=3, parallel__tensor_parallel=2))
