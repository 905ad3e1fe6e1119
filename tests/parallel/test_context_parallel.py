"""Histories shared over ranks: stacks against one process in float64, and training runs against runs of one rank."""

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import NamedTuple

import golden
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from onetrain.model.decoder import SidDecoder
from onetrain.model.inputs import Context, Events
from onetrain.model.ksa.conversion import distillation_loss, freeze_all_but_summaries
from onetrain.model.ksa.layout import Layout
from onetrain.model.ksa.stack import KSAStack
from onetrain.model.options import ConversionOptions, KSAOptions, ModelOptions
from onetrain.parallel import checkpoint, context_parallel
from onetrain.parallel.context_parallel import cut, needs
from onetrain.parallel.engine import Engine
from onetrain.parallel.mesh import Mesh
from onetrain.parallel.options import ParallelOptions
from onetrain.parallel.process_group import Ranks
from onetrain.parallel.testing import WorkerPool

EPS = 1e-6
LENGTHS = {
    "one": (61,),
    "ragged": (7, 0, 33, 2, 19, 1),
    "many short": (3, 2, 4, 1, 3, 2, 4, 4, 1, 3),
    "shorter than a share": (2, 47),
    "empty parts": (3,),
    "nothing": (0, 0),
}


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[int, WorkerPool]]:
    made = {ranks: WorkerPool(ranks, timeout_s=300) for ranks in (1, 2, 4)}
    yield made
    for pool in made.values():
        pool.close()


def cases() -> list[tuple[KSAOptions, str]]:
    """Every kind of layer and window with some of the lengths, in random sizes."""
    dice, found = random.Random(0), []
    for number, (summaries, window) in enumerate(product((0, 1, 2), (0, 1, 3, 100))):
        options = KSAOptions(
            width=16,
            heads=4,
            kv_groups=dice.choice([None, 1, 2]),
            layers=dice.choice([("ksa", "full"), ("full", "ksa"), ("ksa", "full", "ksa")]),
            chunk=dice.randint(1, 5),
            summaries=summaries,
            window=window,
            blend=dice.choice([0.0, 0.3, 1.0]),
            bypass_full=dice.random() < 0.4,
            qk_norm=dice.random() < 0.7,
            d_ff=24,
        )
        found += [(options, name) for place, name in enumerate(LENGTHS) if (number + place) % 2 == 0]
    return found


def some_cases(ranks: int) -> list[tuple[KSAOptions, str]]:
    """All for two ranks; for four the last half, most of which have summaries."""
    every = cases()
    return every[-2 * len(every) // ranks :]


def new_stack(options: KSAOptions) -> KSAStack:
    torch.manual_seed(0)
    made = KSAStack(options, EPS).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.4) if parameter.dim() > 1 else torch.nn.init.uniform_(
            parameter, 0.5, 1.5
        )
    return made


def one_pass(stack: KSAStack, lengths: tuple[int, ...]) -> tuple[Tensor, dict[str, Tensor | None]]:
    """States of random rows, some asked for twice, and every gradient of a loss that all ranks compute alike."""
    g = torch.Generator().manual_seed(1)
    layout = stack.layout(list(lengths), torch.device("cpu"))
    x_TD = torch.randn(layout.n_text, stack.options.width, generator=g, dtype=torch.float64, requires_grad=True)
    rows = layout.n_text + layout.n_summaries
    rows_P = torch.randint(rows, (rows + 5,), generator=g) if rows else torch.empty(0, dtype=torch.int64)
    part = stack.sequence.part(layout)
    states_PD = stack(x_TD[part.text], part, rows_P)
    (states_PD * torch.randn(states_PD.shape, generator=g, dtype=torch.float64)).sum().backward()
    return states_PD.detach(), {"x": x_TD.grad, **{name: p.grad for name, p in stack.named_parameters()}}


def deviations(ranks: Ranks) -> list[tuple[float, float]]:
    """Of every case the worst deviation of a state on this rank, and of a gradient added up over ranks."""
    mesh = Mesh.plan(ranks.world_size, ParallelOptions(context_parallel=ranks.world_size, global_batch_size=4))
    group = context_parallel.start(mesh, 60)
    found = []
    for options, name in some_cases(ranks.world_size):
        stack = new_stack(options)
        expected_PD, expected = one_pass(stack, LENGTHS[name])
        stack.zero_grad()
        context_parallel.apply(stack, group)
        states_PD, gradients = one_pass(stack, LENGTHS[name])
        assert {key for key, value in gradients.items() if value is None} == {
            key for key, value in expected.items() if value is None
        }, (options, name)  # else the buckets of ZeRO would not be alike
        total, wanted = (
            torch.cat([value.flatten() for value in values.values() if value is not None])
            for values in (gradients, expected)
        )
        dist.all_reduce(total)
        state = (states_PD - expected_PD).abs().amax() if len(states_PD) else torch.zeros(())
        found.append((float(state), float((total / ranks.world_size - wanted).abs().max())))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_stacks_compute_what_one_process_does(pools: dict[int, WorkerPool], ranks: int) -> None:
    for of_rank in pools[ranks].run(deviations):
        for case, (state, gradient) in zip(some_cases(ranks), of_rank, strict=True):
            assert state < 1e-10, case
            assert gradient < 1e-10, case


EVENTS, STEPS = 24, 5
VOCABULARY = replace(golden.VOCABULARY, pathways={"history": EVENTS})
SUMMARIES = KSAOptions(width=16, heads=2, kv_groups=1, layers=("ksa", "full", "ksa"), chunk=2, window=1, d_ff=24)
MODELS = {name: replace(golden.MODELS[name], ksa={"history": SUMMARIES}) for name in ("dense", "sparse + auxiliary")}
SHARED = replace(golden.ONE, context_parallel=2)


class Run(NamedTuple):
    """A mix to hold against one rank."""

    world_size: int
    parallel: ParallelOptions
    model: str = "dense"
    optimizer: str = "AdamW"


RUNS = [
    *(Run(2, replace(SHARED, zero_stage=stage)) for stage in (0, 1, 2, 3)),
    Run(2, replace(SHARED, zero_stage=3, checkpoint_blocks="all"), optimizer="SGD"),
    Run(2, replace(SHARED, checkpoint_blocks=(0, 2, 4), micro_batch_size=4), "sparse + auxiliary"),
    Run(4, replace(SHARED, context_parallel=4, zero_stage=1)),
    Run(4, replace(SHARED, zero_stage=3, micro_batch_size=2), "sparse + auxiliary"),
    Run(4, replace(SHARED, tensor_parallel=2, zero_stage=2), optimizer="SGD"),
]


def new_model(options: ModelOptions) -> SidDecoder:
    return golden.new_model(options, VOCABULARY)


def global_batch(step: int) -> golden.Batch:
    """Golden targets; long uneven histories, in one step almost all rows without any."""
    g = torch.Generator().manual_seed(100 + step)
    _, targets = golden.global_batch(step)
    length_B = torch.randint(EVENTS + 1, (golden.ROWS,), generator=g)
    if step == 2:
        length_B[1:] = 0
    sid_BNL = torch.stack([torch.randint(n, (golden.ROWS, EVENTS), generator=g) for n in VOCABULARY.codes], dim=-1)
    item_BN = torch.randint(40, (golden.ROWS, EVENTS), generator=g)
    index_BN = torch.arange(EVENTS).expand(golden.ROWS, -1)
    return Context({"history": Events(sid_BNL, index_BN, length_B, {"item": item_BN})}), targets


def train_all(ranks: Ranks, asked: list[Run]) -> list[golden.Trained | None]:
    return [
        golden.train(
            ranks, new_model(MODELS[run.model]), run.parallel, golden.OPTIMIZERS[run.optimizer], global_batch, STEPS
        )
        for run in asked
    ]


@pytest.fixture(scope="module")
def alone(pools: dict[int, WorkerPool]) -> dict[tuple[str, str], golden.Trained]:
    """One rank."""
    kinds = sorted({(run.model, run.optimizer) for run in RUNS})
    results = pools[1].run(train_all, [Run(1, golden.ONE, *kind) for kind in kinds])[0]
    return dict(zip(kinds, results, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_shared_histories_train_as_one_rank_does(pools: dict[int, WorkerPool], alone: dict, world_size: int) -> None:
    """Losses, norms under active clipping, final weights and routing."""
    asked = [run for run in RUNS if run.world_size == world_size]
    for run, ours in zip(asked, pools[world_size].run(train_all, asked)[0], strict=True):
        one = alone[run.model, run.optimizer]
        assert min(norm for _, norm in one.history) > 1.2 * golden.ONE.gradient_clipping
        row = golden.compare("", run.model, run.optimizer, world_size, ours, one)
        assert row.loss < 1e-5, run
        assert row.norm < 1e-5, run
        assert row.weights < row.tolerance.weights, run
        assert row.flips == 0, run


def evaluated(ranks: Ranks, stages: list[int]) -> list[tuple[Tensor, bool]]:
    """Losses of a model in evaluation between training steps, and whether they are those of the model as it was built.

    One rank evaluates more often than the other.
    """
    found = []
    for stage in stages:
        model = new_model(MODELS["dense"])
        engine = Engine(model, replace(SHARED, zero_stage=stage), golden.OPTIMIZERS["SGD"], ranks, STEPS)
        losses = []
        for _ in range(2):
            with engine.gathered() as whole:
                of_batches = [golden.loss_fn(whole, global_batch(number))[0] for number in range(1 + ranks.rank)]
            losses.append(of_batches[0].detach())
            golden.go_on(engine, global_batch, 1)
        plain = new_model(MODELS["dense"])
        found.append((torch.stack(losses), torch.equal(losses[0], golden.loss_fn(plain, global_batch(0))[0].detach())))
        engine.close()
    return found


def test_evaluation_runs_on_whole_histories_on_every_rank(pools: dict[int, WorkerPool]) -> None:
    one, other = pools[2].run(evaluated, [0, 3])
    for (losses, same), (losses_of_other, _) in zip(one, other, strict=True):
        assert same
        assert torch.equal(losses, losses_of_other)
        assert losses[0] != losses[1]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("name", LENGTHS)
def test_parts_are_whole_chunks_near_equal_shares_and_take_what_they_see(name: str, ranks: int) -> None:
    """Against chunks counted one by one, and the ranges of every row."""
    for chunk, summaries, window in ((1, 1, 0), (4, 1, 2), (3, 2, 1), (5, 0, 1), (4, 1, "full"), (7, 3, 100)):
        layout = Layout.of(LENGTHS[name], chunk, summaries)
        first_rows = zip(layout.text_start_U.tolist(), layout.lengths, strict=True)
        starts = [first + n for first, length in first_rows for n in range(0, length, chunk)] + [layout.n_text]
        whole = layout.chunk_text_ZC[:, 0].tolist()
        parts = cut(layout, ranks)
        assert (parts[0].text_begin, parts[-1].text_end) == (0, layout.n_text)
        assert (parts[0].summary_begin, parts[-1].summary_end) == (0, layout.n_summaries)
        for number, (before, part) in enumerate(pairwise(parts), start=1):
            assert (before.text_end, before.summary_end) == (part.text_begin, part.summary_begin)
            wish = number * layout.n_text / ranks
            assert part.text_begin in starts
            assert abs(part.text_begin - wish) == min(abs(start - wish) for start in starts)
        for part, needed in zip(parts, needs(parts, window), strict=True):
            own = {
                n
                for n, row in enumerate(whole)
                for n in range(n * summaries, (n + 1) * summaries)
                if part.text_begin <= row < part.text_end
            }
            assert own == set(range(part.summary_begin, part.summary_end))
            bounds = torch.stack(part.ranges(window).bounds).T.tolist()
            assert set(needed.text) == {key for begin, end, _, _ in bounds for key in range(begin, end)}
            seen = {key for _, _, begin, end in bounds for key in range(begin, end)}
            assert set(needed.summary) >= seen
            others = len(set(needed.summary) - seen - own)
            assert others <= (0 if window == "full" else min(window, layout.n_text) * summaries)


def restored(ranks: Ranks, folder: Path) -> list[bool]:
    """Of every ZeRO stage, whether a step after a checkpoint is that of the engine that has written it."""
    found = []
    for stage in (0, 2, 3):
        parallel = replace(SHARED, zero_stage=stage)
        before, after = (
            Engine(new_model(MODELS["dense"]), parallel, golden.OPTIMIZERS["AdamW"], ranks, STEPS) for _ in range(2)
        )
        golden.go_on(before, global_batch, 2)
        checkpoint.save(before, folder / str(stage), {})
        checkpoint.load(after, folder / str(stage))
        expected, ours = (golden.go_on(engine, global_batch, 1) for engine in (before, after))
        if expected is not None and ours is not None:
            same = all(torch.equal(ours.weights[name], value) for name, value in expected.weights.items())
            found.append(same and ours.history == expected.history)
        before.close()
        after.close()
    return found


def test_a_checkpoint_restores_every_rank(pools: dict[int, WorkerPool], tmp_path: Path) -> None:
    assert pools[2].run(restored, tmp_path)[0] == [True] * 3


def distilled(ranks: Ranks) -> list[float]:
    """Worst deviation of the loss and of every gradient, added up over ranks, from those of whole histories."""
    options, results = ConversionOptions(stage="distil", mse=5.0, mse_clip=10.0), []
    mesh = Mesh.plan(ranks.world_size, replace(SHARED, global_batch_size=4))
    group = context_parallel.start(mesh, 60)
    for shared in (False, True):
        model = new_model(MODELS["dense"]).double()
        freeze_all_but_summaries(model)
        if shared:
            context_parallel.apply(model, group)
        loss = distillation_loss(model, *global_batch(0), options).loss
        loss.backward()
        total = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        if shared:
            dist.all_reduce(total)
            total /= ranks.world_size
        results.append(torch.cat((loss.detach()[None], total)))
    return [float((results[0] - results[1]).abs().max()), float(results[0].abs().max())]


def test_distillation_sums_its_errors_over_the_ranks_of_a_history(pools: dict[int, WorkerPool]) -> None:
    for deviation, largest in pools[2].run(distilled):
        assert deviation < 1e-9 * largest
