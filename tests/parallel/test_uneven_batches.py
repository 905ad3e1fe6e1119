"""Every kind of parallelism on a global batch that ranks and micro batches do not divide, held against one process."""

from dataclasses import replace
from functools import partial

import golden
import pytest

from onetrain.parallel.options import ParallelOptions
from onetrain.parallel.process_group import Ranks
from onetrain.parallel.testing import WorkerPool

ROWS, STEPS = 7, 3
ONE = replace(golden.ONE, global_batch_size=ROWS)
OPTIMIZER = "SGD"  # AdamW would hide a wrong scale
SPARSE, DENSE, LIFELONG = "sparse + auxiliary", "dense + MTP", "lifelong, dense"
RUNS = [
    (SPARSE, replace(ONE, expert_parallel=2, zero_stage=1)),  # 4 and 3 rows
    (SPARSE, replace(ONE, expert_parallel=2, zero_stage=3, micro_batch_size=2)),  # 2 + 2 and 2 + 1
    (DENSE, replace(ONE, tensor_parallel=2, micro_batch_size=3)),  # 3 + 2 + 2, on both
    (LIFELONG, replace(ONE, context_parallel=2, zero_stage=2, micro_batch_size=3)),
]


def train_all(ranks: Ranks, asked: list[tuple[str, ParallelOptions]]) -> list[golden.Trained | None]:
    batch_of = partial(golden.global_batch, rows=ROWS)
    return [
        golden.train(
            ranks,
            golden.new_model(golden.MODELS[model]),
            parallel,
            golden.OPTIMIZERS[OPTIMIZER],
            batch_of,
            STEPS,
        )
        for model, parallel in asked
    ]


@pytest.mark.slow
def test_uneven_micro_batches_train_as_one_process_does() -> None:
    """Losses, norms under active clipping, weights, biases of routers, and every routing decision."""
    models = [SPARSE, DENSE, LIFELONG]
    with WorkerPool(1) as pool:
        alone = dict(zip(models, pool.run(train_all, [(model, ONE) for model in models])[0], strict=True))
    with WorkerPool(2, timeout_s=300) as pool:
        results = pool.run(train_all, RUNS)[0]
    for (model, parallel), ours in zip(RUNS, results, strict=True):
        one = alone[model]
        assert min(norm for _, norm in one.history) > golden.ONE.gradient_clipping
        row = golden.compare("", model, OPTIMIZER, 2, ours, one)
        assert max(row.loss, row.norm) < 1e-5, (model, parallel, row)
        assert row.weights < row.tolerance.weights, (model, parallel, row)
        assert row.flips == 0, (model, parallel, row)
        assert row.decisions > 100 or model != SPARSE
