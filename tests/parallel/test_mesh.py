"""Meshes of random degrees: who is in which group, and what is said when numbers do not fit."""

import re
from dataclasses import replace
from itertools import chain, count, pairwise
from pathlib import Path

import pytest
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

from onetrain.model.options import KSAOptions, ModelOptions, MoEOptions
from onetrain.parallel.errors import ParallelError
from onetrain.parallel.mesh import GROUP_KINDS, Mesh
from onetrain.parallel.options import ParallelOptions

DENSE = ModelOptions(d_model=48, n_heads=6)
SPARSE = replace(DENSE, moe=MoEOptions(experts=5))
LIFELONG = replace(SPARSE, ksa={"history": KSAOptions()})


@st.composite
def meshes(draw: st.DrawFn, most: int = 6) -> Mesh:
    tensor, context = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    expert, replicas = draw(st.integers(1, 4)), draw(st.integers(1, most))
    data, share = expert * replicas, draw(st.integers(1, 5))
    options = ParallelOptions(
        tensor_parallel=tensor, context_parallel=context, expert_parallel=expert, global_batch_size=data * share
    )
    return Mesh.plan(data * tensor * context, options)


@given(mesh=meshes(), kind=st.sampled_from(GROUP_KINDS))
def test_groups_of_a_kind_hold_every_rank_once(mesh: Mesh, kind: str) -> None:
    groups = mesh.groups(kind)  # type: ignore[arg-type]
    sizes = {
        "tensor": mesh.tensor_parallel,
        "context": mesh.context_parallel,
        "data": mesh.data_parallel,
        "expert": mesh.expert_parallel,
        "expert_data": mesh.data_parallel // mesh.expert_parallel,
    }
    assert sorted(chain(*groups)) == list(range(mesh.world_size))
    assert {len(group) for group in groups} == {sizes[kind]}
    assert all(a < b for group in groups for a, b in pairwise(group))


@given(mesh=meshes(), picks=st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)))
def test_two_ranks_meet_in_the_groups_that_their_places_say(mesh: Mesh, picks: tuple[int, int]) -> None:
    """Places by successive division, independent of the code's own formula."""

    def place(rank: int) -> tuple[int, int, int]:
        rest, t = divmod(rank, mesh.tensor_parallel)
        d, c = divmod(rest, mesh.context_parallel)
        return d, c, t

    (d1, c1, t1), (d2, c2, t2) = (place(pick % mesh.world_size) for pick in picks)
    same_slice = (c1, t1) == (c2, t2)
    expert = mesh.expert_parallel
    expected = {
        "tensor": (d1, c1) == (d2, c2),
        "context": (d1, t1) == (d2, t2),
        "data": same_slice,
        "expert": same_slice and d1 // expert == d2 // expert,
        "expert_data": same_slice and d1 % expert == d2 % expert,
    }
    one, two = (pick % mesh.world_size for pick in picks)
    for kind in GROUP_KINDS:
        assert any(one in group and two in group for group in mesh.groups(kind)) == expected[kind], kind
    assert (mesh.data_rank(one), mesh.data_rank(two)) == (d1, d2)


@given(mesh=meshes())
def test_expert_groups_are_consecutive_data_ranks_of_one_data_group(mesh: Mesh) -> None:
    for group in mesh.groups("expert"):
        ranks = [mesh.data_rank(rank) for rank in group]
        assert ranks == list(range(ranks[0], ranks[0] + mesh.expert_parallel))
        assert ranks[0] % mesh.expert_parallel == 0
        assert any(set(group) <= set(data_group) for data_group in mesh.groups("data"))


@given(mesh=meshes())
def test_the_batch_is_spread_over_data_ranks_only(mesh: Mesh) -> None:
    """Every share of the batch has as many ranks as a replica holds."""
    shares = [mesh.data_rank(rank) for rank in range(mesh.world_size)]
    assert {shares.count(share) for share in range(mesh.data_parallel)} == {
        mesh.tensor_parallel * mesh.context_parallel
    }
    assert mesh.global_batch_size == mesh.data_parallel * mesh.micro_batch_size * mesh.accumulation_steps


@given(world_size=st.integers(1, 64), batch=st.integers(1, 2000), micro=st.none() | st.integers(1, 40))
def test_any_batch_with_a_sample_for_every_rank_is_spread(world_size: int, batch: int, micro: int | None) -> None:
    """As few micro batches as hold it, of rows that are even but for one."""
    options = ParallelOptions(global_batch_size=batch, micro_batch_size=micro)
    fewest = 1 if micro is None else next(n for n in count(1) if n * world_size * micro >= batch)
    if batch < world_size:
        assert "too small" in str(_complaint(world_size, options, None))
        return
    mesh = Mesh.plan(world_size, options)
    assert (mesh.global_batch_size, mesh.accumulation_steps) == (batch, fewest)
    rows = [batch // (world_size * fewest) + (n < batch % (world_size * fewest)) for n in range(world_size * fewest)]
    assert sum(rows) == batch
    assert mesh.micro_batch_size == max(rows) <= (micro or batch)


@settings(max_examples=60, phases=(Phase.explicit, Phase.generate))  # shrinking would search for minutes
@given(
    world_size=st.integers(1, 40),
    tensor=st.integers(1, 7),
    context=st.integers(1, 3),
    expert=st.integers(1, 7),
    batch=st.integers(1, 200),
    micro=st.none() | st.integers(1, 12),
    model=st.sampled_from([None, DENSE, SPARSE, LIFELONG]),
)
def test_a_refusal_names_numbers_that_work(
    world_size: int, tensor: int, context: int, expert: int, batch: int, micro: int | None, model: ModelOptions | None
) -> None:
    """Planning again with any number named succeeds; where no single number mends everything, it fails elsewhere."""
    options = ParallelOptions(
        tensor_parallel=tensor,
        context_parallel=context,
        expert_parallel=expert,
        global_batch_size=batch,
        micro_batch_size=micro,
    )
    told = _complaint(world_size, options, model)
    if told is None:
        assert world_size % (tensor * context * expert) == 0
        return
    names = {"tensor_parallel", "context_parallel", "expert_parallel", "global_batch_size", "micro_batch_size"}
    subject = re.match(r"parallel\.(\w+)", told)
    assert subject is not None, told
    assert subject[1] in names, told
    ways = told.partition(": ")[2]
    outcomes = []
    for verb, numbers in re.findall(r"(set it to|set parallel\.\w+ to|run with) (\d+(?: or \d+)?)", ways):
        for number in map(int, numbers.split(" or ")):
            if verb == "run with":
                changed, ranks = options, number
            else:
                name = subject[1] if verb == "set it to" else verb.split(".")[1].split()[0]
                changed, ranks = replace(options, **{name: number}), world_size
            outcomes.append(_complaint(ranks, changed, model))
    assert outcomes, told
    assert None not in outcomes or set(outcomes) == {None}, (told, outcomes)
    assert without_numbers(told) not in [without_numbers(outcome) for outcome in outcomes if outcome], told


def _complaint(world_size: int, options: ParallelOptions, model: ModelOptions | None) -> str | None:
    try:
        Mesh.plan(world_size, options, model)
    except ParallelError as error:
        return str(error)
    return None


def without_numbers(message: str) -> str:
    return re.sub(r"\d+", "", message.partition(":")[0])


@pytest.mark.parametrize(
    ("world_size", "changes", "model", "message"),
    [
        (3, {"tensor_parallel": 2}, None, r"tensor_parallel 2 needs a multiple of 2 ranks, .* 3: .* run with 2 or 4 "),
        (
            8,
            {"tensor_parallel": 2, "context_parallel": 3},
            None,
            r"tensor_parallel 2 x context_parallel 3 needs a multiple of 6 ranks, .* 8: .*context_parallel to 2 or 4",
        ),
        (6, {"expert_parallel": 4}, None, r"expert_parallel 4 does not divide the 6 ranks: .* run with 4 or 8 ranks"),
        (
            12,
            {"expert_parallel": 4, "tensor_parallel": 2},
            None,
            r"expert_parallel 4 does not divide the 6 data ranks \(12 ranks, 2 a replica\)",
        ),
        (4, {"expert_parallel": 2}, DENSE, r"2 needs experts, and the model has none: set it to 1, or .*model\.moe\."),
        (8, {"expert_parallel": 8}, SPARSE, r"8 is more than the 5 experts of model\.moe\.experts: set it to 4\."),
        (
            4,
            {"context_parallel": 2},
            DENSE,
            r"2 shares .* the model has no pathway of it: set it to 1, or .*model\.ksa\.",
        ),
        (8, {"tensor_parallel": 4}, DENSE, r"4 does not divide the 6 heads of model\.n_heads: set it to 2\."),
        (2, {"micro_batch_size": 0}, None, r"micro_batch_size 0 holds no sample: set it to 1\."),
        (300, {}, None, r"240 is too small for 300 ranks: set it to 300, or run with 240 ranks\."),
        (
            3000,
            {"tensor_parallel": 2, "global_batch_size": 1},
            None,
            r"for 1500 data ranks \(3000 .*: set it to 1500\.",
        ),
        (0, {}, None, r"a mesh of 0 ranks cannot be: run with 1 ranks"),
    ],
)
def test_degrees_that_do_not_fit(world_size: int, changes: dict, model: ModelOptions | None, message: str) -> None:
    options = replace(ParallelOptions(global_batch_size=240), **changes)
    with pytest.raises(ParallelError, match=message):
        Mesh.plan(world_size, options, model)


def test_experts_need_not_divide_evenly() -> None:
    assert Mesh.plan(4, ParallelOptions(expert_parallel=4), SPARSE).expert_parallel == 4


@given(mesh=meshes())
def test_the_picture_of_a_small_mesh_shows_every_rank_in_its_column(mesh: Mesh) -> None:
    assume(mesh.data_parallel <= 12 and mesh.tensor_parallel * mesh.context_parallel <= 8)
    lines = mesh.picture().splitlines()
    rule = next(i for i, line in enumerate(lines) if line.strip(" -") == "" and "-" in line)
    rows = lines[rule + 1 : rule + 1 + mesh.tensor_parallel * mesh.context_parallel]
    grid = [[int(cell) for cell in re.findall(r"\d+", line[line.index("  ") :])] for line in rows]
    assert grid == mesh.groups("data")  # one row a data group
    if mesh.expert_parallel > 1:  # and between bars its expert groups
        inside = [[re.findall(r"\d+", part) for part in row.split("|")[1:-1]] for row in rows]
        assert [[int(rank) for rank in part] for row in inside for part in row] == mesh.groups("expert")


@given(mesh=meshes(most=100))
def test_a_picture_of_any_size_fits_a_terminal(mesh: Mesh) -> None:
    lines = mesh.picture().splitlines()
    assert max(map(len, lines)) <= 100
    assert len(lines) <= 20
    assert all(line == line.rstrip() and line.isascii() for line in lines)
    assert str(mesh.world_size - 1) in mesh.picture()  # the last rank is never left out


def test_the_documentation_shows_what_is_printed() -> None:
    text = (Path(__file__).parents[2] / "docs" / "parallel.md").read_text(encoding="utf-8")
    assert Mesh.plan(8, ParallelOptions(expert_parallel=2)).picture() in text
    with pytest.raises(ParallelError) as caught:
        Mesh.plan(6, ParallelOptions(expert_parallel=4, global_batch_size=240))
    assert str(caught.value) in text


def test_a_large_picture_keeps_expert_groups_whole() -> None:
    picture = Mesh.plan(64, ParallelOptions(expert_parallel=4, global_batch_size=64)).picture()
    ranks = next(line for line in picture.splitlines() if line.startswith("rank"))
    parts = [part.split() for part in ranks.split("|")[1:-1]]
    assert parts == [["0", "1", "2", "3"], ["4", "5", "6", "7", "..."], ["60", "61", "62", "63"]]
