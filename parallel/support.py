"""Which options of `parallel` work together: one place for every refusal, and the table of docs/parallel.md.

A mix that no rule refuses works; `tests/parallel/test_support.py` trains every cell of the table.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import combinations, product
from typing import NamedTuple

from onetrain.model.options import ModelOptions
from onetrain.parallel.errors import ParallelError
from onetrain.parallel.options import ParallelOptions


@dataclass(frozen=True)
class Mix:
    """What can go together or not; degrees and sizes play no part."""

    sparse: bool = False  # a model with experts
    expert_parallel: bool = False
    tensor_parallel: bool = False
    context_parallel: bool = False
    zero_stage: int = 0
    precision: str = "fp32"
    offload_optimizer: bool = False
    checkpoint_blocks: bool = False
    compile: bool = False

    @classmethod
    def of(cls, options: ParallelOptions, model: ModelOptions | None = None) -> "Mix":
        """The mix of a configuration; without a model, that of any model that it could be for."""
        return cls(
            sparse=model is not None and model.moe.experts > 0,
            expert_parallel=options.expert_parallel > 1,
            tensor_parallel=options.tensor_parallel > 1,
            context_parallel=options.context_parallel > 1,
            zero_stage=options.zero_stage,
            precision=options.precision,
            offload_optimizer=options.offload_optimizer,
            checkpoint_blocks=options.checkpoint_blocks not in ("none", ()),
            compile=options.compile,
        )


class Rule(NamedTuple):
    """A kind of mix that does not work."""

    refuses: Callable[[Mix], bool]
    why: str


RULES = (
    Rule(
        lambda mix: mix.context_parallel and mix.expert_parallel,
        "parallel.context_parallel and parallel.expert_parallel do not go together yet",
    ),
    Rule(
        lambda mix: mix.tensor_parallel and mix.expert_parallel,
        "parallel.tensor_parallel and parallel.expert_parallel do not go together yet",
    ),
    Rule(
        lambda mix: mix.tensor_parallel and mix.sparse,
        "parallel.tensor_parallel cuts dense blocks only, and the model has experts",
    ),
    Rule(
        lambda mix: mix.compile and mix.sparse,
        "parallel.compile works for dense blocks only, and the model has experts",
    ),
    Rule(
        lambda mix: mix.compile and mix.zero_stage == 3,
        "parallel.compile needs weights that stay, and ZeRO stage 3 gathers them in hooks that cannot be compiled",
    ),
    Rule(
        lambda mix: mix.precision == "bf16" and mix.zero_stage == 0,
        "parallel.precision bf16 needs fp32 master weights, which ZeRO stage 0 does not keep",
    ),
    Rule(
        lambda mix: mix.offload_optimizer and mix.zero_stage == 0,
        "parallel.offload_optimizer needs optimizer state in parts, which ZeRO stage 0 does not have",
    ),
)


STAGES = (0, 1, 2, 3)
LAYOUTS = {  # rows of the table
    "data parallel, dense": Mix(),
    "data parallel, with experts": Mix(sparse=True),
    "expert x data parallel": Mix(sparse=True, expert_parallel=True),
    "tensor x data parallel, dense": Mix(tensor_parallel=True),
    "tensor x data parallel, with experts": Mix(sparse=True, tensor_parallel=True),
    "tensor x expert parallel": Mix(sparse=True, tensor_parallel=True, expert_parallel=True),
    "context x data parallel, dense": Mix(context_parallel=True),
    "context x data parallel, with experts": Mix(sparse=True, context_parallel=True),
    "context x expert parallel": Mix(sparse=True, context_parallel=True, expert_parallel=True),
}
ADDITIONS: dict[str, dict[str, object]] = {  # columns; fp32 without the rest stands alone
    "alone": {},
    "bf16": {"precision": "bf16"},
    "offload_optimizer": {"offload_optimizer": True},
    "checkpoint_blocks": {"checkpoint_blocks": True},
    "these three": {"precision": "bf16", "offload_optimizer": True, "checkpoint_blocks": True},
    "compile": {"compile": True},
    "all four": {"precision": "bf16", "offload_optimizer": True, "checkpoint_blocks": True, "compile": True},
}


def refusal(mix: Mix) -> str | None:
    """Why a mix does not work; None when it does."""
    return next((rule.why for rule in RULES if rule.refuses(mix)), None)


def check_mix(options: ParallelOptions, model: ModelOptions | None = None) -> None:
    """Raises ParallelError for a mix that does not work, naming the nearest that does; builds nothing."""
    mix = Mix.of(options, model)
    why = refusal(mix)
    if why is not None:
        raise ParallelError(f"{why}: set {', or '.join(map(_in_words, nearest(mix)))}.")


def nearest(mix: Mix) -> list[dict[str, object]]:
    """The smallest sets of options to change, with their new values, so that no rule refuses the mix."""
    stages = sorted(STAGES, key=lambda stage: abs(stage - mix.zero_stage))
    choices: dict[str, list[object]] = {
        "context_parallel": [False],
        "expert_parallel": [False],
        "tensor_parallel": [False],
        "zero_stage": [*stages],
        "precision": ["fp32"],
        "offload_optimizer": [False],
        "checkpoint_blocks": [False],
        "compile": [False],
    }
    open_choices = {name: [v for v in values if v != getattr(mix, name)] for name, values in choices.items()}
    for count in range(1, len(choices) + 1):
        found = []
        for names in combinations(choices, count):
            values = product(*(open_choices[name] for name in names))
            changes = (dict(zip(names, chosen, strict=True)) for chosen in values)
            found += [change for change in changes if refusal(replace(mix, **change)) is None][:1]  # type: ignore[arg-type]
        if found:
            return found
    raise AssertionError(f"nothing near {mix} works")  # the plainest mix is refused by no rule


def _in_words(changes: dict[str, object]) -> str:
    written = {
        "expert_parallel": "1",
        "tensor_parallel": "1",
        "context_parallel": "1",
        "checkpoint_blocks": "none",
        "offload_optimizer": "false",
        "compile": "false",
    }
    return " and ".join(f"parallel.{name} to {written.get(name, value)}" for name, value in changes.items())


def all_mixes() -> Iterator[Mix]:
    """Every mix there is."""
    values = {"zero_stage": STAGES, "precision": ("fp32", "bf16")}
    names = [field.name for field in fields(Mix)]
    for chosen in product(*(values.get(name, (False, True)) for name in names)):
        mix = Mix(**dict(zip(names, chosen, strict=True)))  # type: ignore[arg-type]
        if mix.sparse or not mix.expert_parallel:  # the mesh refuses expert parallelism without experts
            yield mix


def mix_of_cell(layout: str, addition: str, zero_stage: int) -> Mix:
    """The mix of a row and column of the table at one ZeRO stage."""
    return replace(LAYOUTS[layout], zero_stage=zero_stage, **ADDITIONS[addition])  # type: ignore[arg-type]


def working_cells() -> Iterator[tuple[str, str, int]]:
    """Layout, addition and ZeRO stage of everything in the table that works."""
    for layout, addition, stage in product(LAYOUTS, ADDITIONS, STAGES):
        if refusal(mix_of_cell(layout, addition, stage)) is None:
            yield layout, addition, stage


def table() -> list[list[str]]:
    """The table of docs/parallel.md: for every layout and what is added to it the ZeRO stages that work."""
    working = set(working_cells())
    rows = [["ranks", *ADDITIONS]]
    for layout in LAYOUTS:
        stages = [[stage for stage in STAGES if (layout, addition, stage) in working] for addition in ADDITIONS]
        rows.append([layout, *(_range(of_cell) for of_cell in stages)])
    return rows


def _range(stages: list[int]) -> str:
    if not stages:
        return "refused"
    if stages == list(range(stages[0], stages[-1] + 1)) and len(stages) > 1:
        return f"ZeRO {stages[0]}-{stages[-1]}"
    return f"ZeRO {', '.join(map(str, stages))}"
