"""What is done to a model before DeepSpeed gets it: rank 0's weights are the ones that are cut; refusals come first."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from golden import DENSE, MODELS, ONE, OPTIMIZERS, SPARSE, VOCABULARY, new_model
from torch import nn

from onetrain.model.build import build
from onetrain.model.options import ModelOptions
from onetrain.parallel import process_group
from onetrain.parallel.apply import before_deepspeed
from onetrain.parallel.engine import Engine
from onetrain.parallel.errors import ParallelError
from onetrain.parallel.mesh import Mesh
from onetrain.parallel.optimizer_state import VALUE, gather
from onetrain.parallel.options import ParallelOptions
from onetrain.parallel.process_group import Ranks
from onetrain.parallel.testing import WorkerPool

SHARED = {
    "experts": (SPARSE, replace(ONE, expert_parallel=2)),
    "experts, ZeRO 3": (SPARSE, replace(ONE, expert_parallel=2, zero_stage=3)),
    "layers": (DENSE, replace(ONE, tensor_parallel=2)),
}


@pytest.fixture(scope="module")
def two() -> Iterator[WorkerPool]:
    with WorkerPool(2) as pool:
        yield pool


def first_weights(ranks: Ranks, options: ModelOptions, parallel: ParallelOptions) -> dict[str, torch.Tensor]:
    """Whole, as training and evaluation start from them; every rank has built another model."""
    torch.manual_seed(ranks.rank)
    engine = Engine(build(options, VOCABULARY), parallel, OPTIMIZERS["SGD"], ranks, 10)
    values = gather(engine).get(VALUE, {})
    with engine.gathered() as whole:
        seen = {name: parameter.detach().clone() for name, parameter in whole.named_parameters()}
    engine.close()
    return {name: value for name, value in values.items() if not torch.equal(value, seen[name])} | {"": seen}


@pytest.mark.parametrize("name", SHARED)
def test_every_rank_gets_a_part_of_the_weights_of_rank_0(two: WorkerPool, name: str) -> None:
    options, parallel = SHARED[name]
    torch.manual_seed(0)
    expected = dict(build(options, VOCABULARY).named_parameters())
    for found in two.run(first_weights, options, parallel):
        seen = found.pop("")
        assert found == {}  # what a checkpoint would hold is what evaluation sees
        assert seen.keys() == expected.keys()
        for key, parameter in expected.items():
            assert torch.equal(seen[key], parameter), key


@pytest.mark.parametrize("degree", ["tensor_parallel", "expert_parallel"])
def test_what_cannot_be_shared_is_refused_at_once(degree: str) -> None:
    options = replace(ONE, **{degree: 2})
    mesh = Mesh.plan(2, options)
    with pytest.raises(ParallelError, match=r"Linear is not one of onetrain's decoders.* to 1"):
        before_deepspeed(nn.Linear(2, 2), options, mesh, 60)
    frozen = new_model(MODELS["sparse"])
    frozen.tokens.requires_grad_(False)
    with pytest.raises(ParallelError, match=r"Frozen parameters cannot be shared.*requires_grad"):
        before_deepspeed(frozen, options, mesh, 60)


def test_blocks_that_are_not_there_are_refused_before_a_model_is_built() -> None:
    from onetrain.parallel.deepspeed_config import check_options

    with pytest.raises(ParallelError, match="names 3; the model's blocks are 0 to 2"):
        check_options(replace(ONE, checkpoint_blocks=(1, 3)), 1, DENSE)


@pytest.fixture(autouse=True)
def _no_group_is_left() -> Iterator[None]:
    yield
    process_group.stop()
