"""Distillation, which freezes most of a model, under every ZeRO stage on two ranks against a plain loop; and how
weights cross from one stage of a conversion to the next, wherever they lie.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1] / "model"))
from conversion_cases import FULL, INPUTS, converted, inputs, new_model, rows_of

from onetrain.model.ksa.conversion import distillation_loss, freeze_all_but_summaries, set_blend
from onetrain.model.loss import LossParts, training_loss
from onetrain.model.options import ConversionOptions
from onetrain.parallel import activation_checkpointing
from onetrain.parallel.checkpoint import load, save, start_from
from onetrain.parallel.engine import Engine
from onetrain.parallel.errors import ParallelError
from onetrain.parallel.optimizer_state import VALUE, gather
from onetrain.parallel.options import OptimizerOptions, ParallelOptions
from onetrain.parallel.param_groups import learning_rate_factor, parameter_groups
from onetrain.parallel.process_group import Ranks
from onetrain.parallel.testing import RankFailedError, WorkerPool

STAGES = (0, 1, 2, 3)
STEPS = 3
OPTIMIZER = OptimizerOptions(learning_rate=0.002, warmup_steps=2)
PARALLEL = ParallelOptions(
    global_batch_size=8,
    micro_batch_size=2,
    gradient_clipping=0.5,
    deepspeed={"zero_optimization": {"stage3_param_persistence_threshold": 0}},
)
LENGTHS = ([16, 2, 11, 1, 2, 0, 1, 2], [9, 14, 0, 16, 5, 10, 12, 6])  # the second rank has no complete chunk at first


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    with WorkerPool(2) as workers:
        yield workers


def global_batch(step: int) -> INPUTS:
    return inputs(LENGTHS[step % 2], seed=step)


def loss_fn(module: nn.Module, batch: INPUTS) -> LossParts:
    return distillation_loss(module, *batch, ConversionOptions(stage="distil"), chunk=4, most_targets=8)


def weight_fn(batch: INPUTS) -> float:
    return float(batch[1].weight_BT.sum())


def frozen_model() -> nn.Module:
    model = new_model()
    freeze_all_but_summaries(model)
    return model


def train(engine: Engine, first: int, last: int) -> list[tuple[float, float]]:
    history = []
    for step in range(first, last):
        begin = 4 * engine.ranks.rank
        size = 4 // engine.mesh.accumulation_steps
        cuts = range(begin, begin + 4, size)
        parts = [rows_of(global_batch(step), slice(cut, cut + size)) for cut in cuts]
        result = engine.train_step(parts, loss_fn, weight_fn)
        history.append((result.loss, result.grad_norm))
    return history


def distil(ranks: Ranks, folder: Path) -> dict[int, tuple[list, dict[str, Tensor] | None]]:
    """Per ZeRO stage: losses and norms of every step, and on rank 0 the weights; stages 2 and 3 resume on the way."""
    torch.use_deterministic_algorithms(True)
    results = {}
    for stage in STAGES:
        options = replace(PARALLEL, zero_stage=stage, micro_batch_size=4 if stage % 2 else 2)
        engine = Engine(frozen_model(), options, OPTIMIZER, ranks, 10)
        history = train(engine, 0, 2)
        if stage > 1:
            save(engine, folder / f"half{stage}", {})
            engine.close()
            other = new_model(seed=9)
            freeze_all_but_summaries(other)
            engine = Engine(other, options, OPTIMIZER, ranks, 10)
            load(engine, folder / f"half{stage}")
        history += train(engine, 2, STEPS)
        results[stage] = history, gather(engine).get(VALUE)
        engine.close()
    return results


def distil_plainly() -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    model = frozen_model()
    groups: list[dict[str, Any]] = parameter_groups(model, OPTIMIZER)
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps)
    history = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * learning_rate_factor(step, 10, OPTIMIZER)
        loss_sum, weight, _ = loss_fn(model, global_batch(step))
        loss = loss_sum / weight
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), PARALLEL.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        history.append((loss.item(), norm.item()))
    return history, {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_distillation_at_every_zero_stage_equals_a_plain_loop(pool: WorkerPool, tmp_path: Path) -> None:
    expected, expected_weights = distil_plainly()
    assert any(norm > PARALLEL.gradient_clipping for _, norm in expected)  # clipping is active
    before = dict(new_model().named_parameters())
    learned = {name for name in before if not torch.equal(before[name], expected_weights[name])}
    assert len(learned) == 10
    for stage, (history, weights) in pool.run(distil, tmp_path)[0].items():
        torch.testing.assert_close(torch.tensor(history), torch.tensor(expected), rtol=3e-5, atol=1e-7)
        for name, weight in expected_weights.items():
            if name in learned:
                torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=2e-6, msg=f"{name}, stage {stage}")
            else:
                assert torch.equal(weights[name], before[name]), name


def frozen_in_bf16(ranks: Ranks, folder: Path) -> dict[int, set[str]]:
    """Per ZeRO stage the parameters that a run in bf16 and its checkpoint did not change by a bit; on rank 0.

    Frozen weights have no fp32 master at DeepSpeed; checkpoints must not round them all the same.
    """
    unchanged = {}
    before = {name: parameter.detach().clone() for name, parameter in new_model().named_parameters()}
    for stage in (1, 3):
        options = replace(PARALLEL, zero_stage=stage, precision="bf16", micro_batch_size=4)
        engine = Engine(frozen_model(), options, OPTIMIZER, ranks, 10)
        train(engine, 0, 1)
        save(engine, folder / f"bf{stage}", {})
        engine.close()
        other = new_model(seed=9)
        freeze_all_but_summaries(other)
        engine = Engine(other, options, OPTIMIZER, ranks, 10)
        start_from(engine, folder / f"bf{stage}")
        values = gather(engine, (VALUE,))[VALUE]
        engine.close()
        unchanged[stage] = {name for name, value in values.items() if torch.equal(value, before[name])}
    return unchanged


def test_frozen_weights_stay_exact_in_bf16(pool: WorkerPool, tmp_path: Path) -> None:
    frozen = {name for name, _ in new_model().named_parameters() if ".summary." not in name}
    assert pool.run(frozen_in_bf16, tmp_path)[0] == {1: frozen, 3: frozen}


def cross(ranks: Ranks, folder: Path) -> list[tuple[int, int, list[float], str]]:
    """full -> distil (with and without frozen parameters) -> tune, at every ZeRO stage; the weights are compared here.

    Of every stage the summary projections that were copied, the tensors that were dropped, the blends of the model that
    is validated, and why a checkpoint that still uses its projections is refused.
    """
    found = []
    single = replace(PARALLEL, micro_batch_size=4)
    source = Engine(new_model(converted(layers=FULL, summaries=0)), single, OPTIMIZER, ranks, 10)
    save(source, folder / "full", {})
    source.close()
    full = load_file(folder / "full" / "model.safetensors")
    for stage in STAGES:
        options = replace(single, zero_stage=stage)
        model = new_model(seed=5)
        embedding = model.context.pathways["lifelong"].stack.summary.weight.detach().clone()
        if stage % 2:
            freeze_all_but_summaries(model)
        engine = Engine(model, options, OPTIMIZER, ranks, 10)
        across = start_from(engine, folder / "full")
        values = gather(engine, (VALUE,))[VALUE]
        for name, value in values.items() if ranks.is_main else ():
            if name.endswith("stack.summary.weight"):
                assert torch.equal(value, embedding)
            else:
                assert torch.equal(value, full[name.replace(".attention.summary.", ".attention.text.")]), name
        set_blend(model, 0.25)
        with engine.gathered() as module:  # what is validated
            blends = {name: float(buffer) for name, buffer in module.named_buffers() if name.endswith(".blend")}
        save(engine, folder / "annealing", {})
        set_blend(model, 0.0)
        save(engine, folder / "annealed", {})
        engine.close()

        tuned = Engine(new_model(converted(blend=0.0), seed=6), options, OPTIMIZER, ranks, 10)
        with pytest.raises(ParallelError) as refused:
            start_from(tuned, folder / "annealing")
        dropped = len(start_from(tuned, folder / "annealed").dropped)
        found.append((len(across.copies), dropped, list(blends.values()), str(refused.value)))
        values = gather(tuned, (VALUE,))[VALUE]
        if ranks.is_main:
            annealed = load_file(folder / "annealed" / "model.safetensors")
            assert values.keys() < annealed.keys()
            assert all(torch.equal(value, annealed[name]) for name, value in values.items())
        tuned.close()
    return found


def test_weights_cross_between_the_stages_of_a_conversion(pool: WorkerPool, tmp_path: Path) -> None:
    stages = pool.run(cross, tmp_path)[0]
    assert len(stages) == len(STAGES)
    for copied, dropped, blends, refusal in stages:
        assert (copied, dropped, blends) == (9, 12, [0.25] * 3)
        assert re.search(r"blend is 0\.25\), which this model does not have.*Anneal them away", refusal)


def test_layers_that_recompute_give_the_same_loss_and_gradients() -> None:
    plain, recomputing = frozen_model(), frozen_model()
    activation_checkpointing.apply(recomputing, "all")
    losses = [loss_fn(model, global_batch(1)).loss for model in (plain, recomputing)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for (name, ours), theirs in zip(recomputing.named_parameters(), plain.parameters(), strict=True):
        assert not ours.requires_grad or torch.equal(ours.grad, theirs.grad), name


def strict(ranks: Ranks, folder: Path) -> None:
    source = Engine(new_model(), replace(PARALLEL, micro_batch_size=4), OPTIMIZER, ranks, 10)
    save(source, folder / "hybrid", {})
    source.close()
    wider = Engine(new_model(converted(d_ff=25)), replace(PARALLEL, micro_batch_size=4), OPTIMIZER, ranks, 10)
    start_from(wider, folder / "hybrid")


def test_all_else_is_as_strict_as_before(pool: WorkerPool, tmp_path: Path) -> None:
    with pytest.raises(RankFailedError, match=r"does not fit the model: context.*ffn.*has shape"):
        pool.run(strict, tmp_path)


def norms_of_an_anneal(ranks: Ranks) -> dict[int, list[float]]:
    """Gradient norms of steps in which the summary projections lose all weight, by ZeRO stage."""
    norms = {}
    for stage in (0, 3):
        engine = Engine(new_model(), replace(PARALLEL, zero_stage=stage), OPTIMIZER, ranks, 10)
        half = slice(4 * ranks.rank, 4 * ranks.rank + 4)
        norms[stage] = []
        for step, blend in enumerate((1.0, 1.0, 0.0, 0.0, 0.0)):
            set_blend(engine.module, blend)
            mine = rows_of(global_batch(step), half)
            parts = [rows_of(mine, slice(0, 2)), rows_of(mine, slice(2, 4))]
            result = engine.train_step(
                parts, lambda module, batch: training_loss(module(*batch), module.options), weight_fn
            )
            norms[stage].append(result.grad_norm)
        engine.close()
    return norms


def test_projections_without_weight_have_no_part_in_the_norm(pool: WorkerPool) -> None:
    """ZeRO 3 would keep the last gradient of a parameter that gets none."""
    norms = pool.run(norms_of_an_anneal)[0]
    assert norms[3] == pytest.approx(norms[0], rel=2e-5)
