import pytest
from train_cases import changed, make_job

from onetrain.parallel.process_group import VARIABLES
from onetrain.parallel.testing import WorkerPool


@pytest.fixture(scope="session")
def prepared_job(tmp_path_factory):
    """The tiny job; tests may read its prepared folder, and write elsewhere."""
    return make_job(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def tiny(prepared_job, tmp_path, monkeypatch):
    """The tiny job with a run folder of this test, outside any process group."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return changed(prepared_job, storage_path=str(tmp_path / "runs"))


@pytest.fixture(scope="session")
def two_ranks():
    with WorkerPool(2, timeout_s=300) as pool:  # a busy machine
        yield pool
