"""The table of mixes: what is refused and what for, and every cell that works trained against one process."""

from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from golden import MODELS, ONE, OPTIMIZERS, global_batch, go_on, new_model, train_plainly
from torch import nn

from onetrain.parallel import context_parallel
from onetrain.parallel.context_parallel import SharedSequence
from onetrain.parallel.engine import Engine
from onetrain.parallel.errors import ParallelError
from onetrain.parallel.options import ParallelOptions
from onetrain.parallel.process_group import Ranks
from onetrain.parallel.support import (
    RULES,
    Mix,
    all_mixes,
    check_mix,
    mix_of_cell,
    nearest,
    table,
    working_cells,
)
from onetrain.parallel.testing import WorkerPool

STEPS = 4
DOCS = Path(__file__).parents[2] / "docs" / "parallel.md"
WORKING = list(dict.fromkeys((layout, addition) for layout, addition, _ in working_cells()))


@pytest.fixture(scope="module")
def pool():
    with WorkerPool(2, timeout_s=580) as pool:
        yield pool


def options_of(mix: Mix) -> ParallelOptions:
    return replace(
        ONE,
        tensor_parallel=2 if mix.tensor_parallel else 1,
        context_parallel=2 if mix.context_parallel else 1,
        expert_parallel=2 if mix.expert_parallel else 1,
        zero_stage=mix.zero_stage,  # type: ignore[arg-type]
        precision=mix.precision,  # type: ignore[arg-type]
        offload_optimizer=mix.offload_optimizer,
        checkpoint_blocks="all" if mix.checkpoint_blocks else "none",
        compile=mix.compile,
    )


def model_of(mix: Mix) -> str:
    kind = "sparse" if mix.sparse else "dense"
    return f"lifelong, {kind}" if mix.context_parallel else kind


def test_a_refusal_names_the_nearest_mixes_that_work() -> None:
    """Of every mix; found here by comparing it with all others."""
    mixes = list(all_mixes())
    working = [mix for mix in mixes if not any(rule.refuses(mix) for rule in RULES)]
    assert 0 < len(working) < len(mixes)
    for mix in mixes:
        options, model = options_of(mix), MODELS[model_of(mix)]
        assert Mix.of(options, model) == mix
        if mix in working:
            check_mix(options, model)
            continue
        with pytest.raises(ParallelError) as caught:
            check_mix(options, model)
        least = min(_apart(mix, other) for other in working if other.sparse == mix.sparse)
        ways = nearest(mix)
        assert {len(way) for way in ways} == {least}
        for way in ways:
            assert replace(mix, **way) in working  # type: ignore[arg-type]
            assert all(f"parallel.{name}" in str(caught.value) for name in way)


def _apart(one: Mix, other: Mix) -> int:
    """Options that differ."""
    return sum(getattr(one, field.name) != getattr(other, field.name) for field in fields(Mix))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "bf16"}, r"bf16 needs .*: set parallel\.zero_stage to 1, or parallel\.precision to fp32\."),
        ({"offload_optimizer": True}, r"stage 0 does not have: set parallel\.zero_stage to 1, or parallel\.offload"),
        ({"precision": "bf16", "offload_optimizer": True}, r": set parallel\.zero_stage to 1\."),
        ({"compile": True, "zero_stage": 3}, r": set parallel\.zero_stage to 2, or parallel\.compile to false\."),
        (
            {"context_parallel": 2, "expert_parallel": 2},
            r"together yet: set parallel\.context_parallel to 1, or parallel\.expert_parallel to 1\.",
        ),
        (
            {"tensor_parallel": 2, "expert_parallel": 2},
            r"together yet: set parallel\.expert_parallel to 1, or parallel\.tensor_parallel to 1\.",
        ),
    ],
)
def test_what_is_said(changes: dict, message: str) -> None:
    with pytest.raises(ParallelError, match=message):
        check_mix(replace(ParallelOptions(), **changes))


def test_tensor_parallelism_of_experts_is_refused_by_the_model() -> None:
    check_mix(ParallelOptions(tensor_parallel=2), MODELS["dense"])
    with pytest.raises(ParallelError, match=r"model has experts: set parallel\.tensor_parallel to 1\."):
        check_mix(ParallelOptions(tensor_parallel=2), MODELS["sparse"])


def test_the_documentation_has_the_table_and_every_refusal() -> None:
    text = DOCS.read_text(encoding="utf-8")
    header, *rows = ["| " + " | ".join(row) + " |" for row in table()]
    rule = "|" + "---|" * len(table()[0])
    assert "\n".join([header, rule, *rows]) in text
    for mix_rule in RULES:
        assert mix_rule.why in " ".join(text.replace("`", "").split()), mix_rule.why


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "addition"), WORKING)
def test_every_cell_that_works_trains_as_one_process_does(pool: WorkerPool, layout: str, addition: str) -> None:
    """Losses and gradient norms of steps with active clipping; in bf16 they are held to bf16's own precision."""
    stages = [stage for *cell, stage in working_cells() if cell == [layout, addition]]
    mixes = [mix_of_cell(layout, addition, stage) for stage in stages]
    for mix, (history, applied) in zip(mixes, pool.run(_train_cells, mixes)[0], strict=True):
        assert applied == mix
        expected = _plain(model_of(mix))[: _steps(mix)]
        close = 0.03 if mix.precision == "bf16" else 1e-5
        where = f"ZeRO {mix.zero_stage}"
        assert [loss for loss, _ in history] == pytest.approx([loss for loss, _ in expected], rel=close), where
        assert [norm for _, norm in history] == pytest.approx([norm for _, norm in expected], rel=2 * close), where


def _steps(mix: Mix) -> int:
    return (
        2 if mix.compile or mix.context_parallel else STEPS
    )  # every new shape is compiled; longer shared runs: test_context_parallel.py


@cache
def _plain(model: str) -> list[tuple[float, float]]:
    return train_plainly(model, "SGD", STEPS).history


def _train_cells(ranks: Ranks, mixes: list[Mix]) -> list[tuple[list[tuple[float, float]], Mix]]:
    return [_train_cell(ranks, mix) for mix in mixes]


def _train_cell(ranks: Ranks, mix: Mix) -> tuple[list[tuple[float, float]], Mix]:
    """The history, and the mix as the engine shows it has been applied."""
    torch._dynamo.reset()
    compiled = nn.Module.compile
    nn.Module.compile = lambda self: compiled(self, backend="aot_eager")  # type: ignore[method-assign]  # no C++ compiler
    try:
        engine = Engine(new_model(MODELS[model_of(mix)]), options_of(mix), OPTIMIZERS["SGD"], ranks, STEPS)
    finally:
        nn.Module.compile = compiled  # type: ignore[method-assign]
    blocks: Any = engine.module.blocks
    stacks = context_parallel.stacks(engine.module)
    recomputing = [*blocks, *(block for stack in stacks for block in stack.blocks)]
    names = " ".join(name for name, placement in engine.placements.items() if placement.dim is not None)
    applied = Mix(
        sparse=mix.sparse,
        expert_parallel=".experts." in names,
        tensor_parallel=".down." in names,
        context_parallel=any(isinstance(stack.sequence, SharedSequence) for stack in stacks),
        zero_stage=engine.deepspeed.zero_optimization_stage(),
        precision="bf16" if engine.deepspeed.bfloat16_enabled() else "fp32",
        offload_optimizer=engine.deepspeed.zero_offload_optimizer() is not None,
        checkpoint_blocks=all(isinstance(vars(block).get("forward"), MethodType) for block in recomputing),
        compile=all(block._compiled_call_impl is not None for block in blocks),
    )
    try:
        result = go_on(engine, global_batch, _steps(mix))
    finally:
        engine.close()
    return ([] if result is None else result.history), applied
