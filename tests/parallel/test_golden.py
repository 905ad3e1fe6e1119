"""The table of golden runs: every mix on one model, optimizers in turn; benchmarks/golden.py prints it with all."""

import pytest
import torch
from golden import MODELS, ONE, OPTIMIZERS, STEPS, Row, global_batch, new_model, train_plainly
from golden_table import broken, table


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return table(everything=False)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_every_mix_equals_one_process(rows: list[Row]) -> None:
    assert [problem for row in rows for problem in broken(row)] == []
    assert {row.optimizer for row in rows} == set(OPTIMIZERS)
    assert sum(row.flips for row in rows) == 0
    assert all(row.decisions > 1000 for row in rows if "sparse" in row.model)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_runs_are_worth_comparing(optimizer: str) -> None:
    """Clipping is active, weights and biases move far beyond the tolerance, ranks get uneven shares, some none."""
    name = "sparse + auxiliary"
    one, first = train_plainly(name, optimizer), new_model(MODELS[name])
    losses, norms = torch.tensor(one.history).T
    assert (norms > ONE.gradient_clipping).double().mean() > 0.9
    assert losses[-5:].mean() < losses[:5].mean()
    for parameter, value in first.named_parameters():
        moved = (one.weights[parameter] - value.detach()).abs().max()
        assert moved > (1e-3 if optimizer == "AdamW" else 5e-5), parameter
    assert all(one.weights[f"bias {n}"].abs().max() > 0.05 for n in range(2))
    halves = [[int((half > 0).sum()) for half in global_batch(step)[1].weight_BT.chunk(2)] for step in range(STEPS)]
    assert 0 in {second for _, second in halves}
    assert len({first - second for first, second in halves}) > 5
    chosen = torch.cat([expert_ZMK.flatten() for expert_ZMK in one.expert_ZMK])
    assert chosen.bincount(minlength=8).min() > 0
