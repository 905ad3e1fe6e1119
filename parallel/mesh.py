"""The mesh: which ranks share what, and how a global batch is spread over them. Validated once, before anything starts.

A rank's place is rank = (data rank * context_parallel + context rank) * tensor_parallel + tensor rank, so that tensor
groups, which talk most, are neighbours. Expert groups are consecutive data ranks, as DeepSpeed's AutoEP makes them.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

from onetrain.model.options import ModelOptions
from onetrain.parallel.errors import ParallelError
from onetrain.parallel.mesh_picture import draw
from onetrain.parallel.options import ParallelOptions

GroupKind = Literal["tensor", "context", "data", "expert", "expert_data"]
GROUP_KINDS: tuple[GroupKind, ...] = get_args(GroupKind)
SEARCHED = 1_000  # numbers looked at, on either side, for one that works


@dataclass(frozen=True)
class Mesh:
    """How many ranks do what.

    Every one of `data_parallel` replicas (of `tensor_parallel * context_parallel` ranks each) runs `accumulation_steps`
    micro batches of its own samples; `expert_parallel` of them share the routed experts. Micro batches may differ in
    rows, on one rank and between ranks: the loss is divided by the weight of all targets, not by rows.
    """

    world_size: int
    tensor_parallel: int
    context_parallel: int
    expert_parallel: int
    data_parallel: int
    global_batch_size: int
    micro_batch_size: int  # the even share of rows, rounded up; at most what the options ask for
    accumulation_steps: int

    @classmethod
    def plan(cls, world_size: int, options: ParallelOptions, model: ModelOptions | None = None) -> "Mesh":
        """Places `world_size` ranks, and spreads `global_batch_size` over the micro batches of the data ranks.

        The batch need not divide evenly, but has a sample for every data rank. With `model` its heads and experts are
        held against the degrees too. Raises ParallelError, naming the nearest numbers that work, where something does
        not fit.
        """
        wish = _Wish(
            world_size,
            options.tensor_parallel,
            options.context_parallel,
            options.expert_parallel,
            options.global_batch_size,
            options.micro_batch_size,
        )
        problem = _problem(wish, model)
        if problem is not None:
            raise ParallelError(_told(wish, model, problem))
        return cls(
            world_size=world_size,
            tensor_parallel=wish.tensor_parallel,
            context_parallel=wish.context_parallel,
            expert_parallel=wish.expert_parallel,
            data_parallel=wish.data_parallel,
            global_batch_size=wish.global_batch_size,
            micro_batch_size=-(-wish.global_batch_size // wish.micro_batches),
            accumulation_steps=wish.accumulation_steps,
        )

    @property
    def replica_ranks(self) -> int:
        """Ranks that hold one replica together, and read the same samples."""
        return self.tensor_parallel * self.context_parallel

    def data_rank(self, rank: int) -> int:
        """Which of the `data_parallel` shares of the batch a rank works on."""
        return rank // self.replica_ranks

    def groups(self, kind: GroupKind) -> list[list[int]]:
        """All groups of one kind; together they hold every rank once.

        tensor: share every layer. context: share a history. data: hold the same slice of the model and train different
        samples. expert: those of a data group that share the experts. expert_data: those of a data group that hold the
        same experts.
        """
        data, context, tensor = (range(n) for n in (self.data_parallel, self.context_parallel, self.tensor_parallel))

        def at(d: int, c: int, t: int) -> int:
            return (d * self.context_parallel + c) * self.tensor_parallel + t

        if kind == "tensor":
            return [[at(d, c, t) for t in tensor] for d in data for c in context]
        if kind == "context":
            return [[at(d, c, t) for c in context] for d in data for t in tensor]
        replicas = [[at(d, c, t) for d in data] for c in context for t in tensor]
        if kind == "data":
            return replicas
        size = self.expert_parallel
        if kind == "expert":
            return [group[i : i + size] for group in replicas for i in range(0, len(group), size)]
        return [group[i::size] for group in replicas for i in range(size)]

    def summary(self) -> str:
        """The degrees in one line."""
        return self.picture().splitlines()[0]

    def picture(self) -> str:
        """Ranks and groups as a grid of plain text, at most 100 columns wide."""
        return draw(
            data=self.data_parallel,
            context=self.context_parallel,
            tensor=self.tensor_parallel,
            expert=self.expert_parallel,
        )


@dataclass(frozen=True)
class _Wish:
    """The numbers that a mesh is planned from."""

    world_size: int
    tensor_parallel: int
    context_parallel: int
    expert_parallel: int
    global_batch_size: int
    micro_batch_size: int | None

    @property
    def data_parallel(self) -> int:
        return self.world_size // (self.tensor_parallel * self.context_parallel)

    @property
    def accumulation_steps(self) -> int:
        """Micro batches of a rank: as few as hold its share if none has more rows than asked for."""
        if self.micro_batch_size is None:
            return 1
        return max(-(-self.global_batch_size // (self.data_parallel * self.micro_batch_size)), 1)

    @property
    def micro_batches(self) -> int:
        """Of a step, over all data ranks."""
        return self.data_parallel * self.accumulation_steps

    @property
    def ranks(self) -> str:
        """The ranks that share the batch, in words."""
        if self.data_parallel == self.world_size:
            return f"{self.world_size} ranks"
        degrees = self.tensor_parallel * self.context_parallel
        return f"{self.data_parallel} data ranks ({self.world_size} ranks, {degrees} a replica)"


class _Problem(NamedTuple):
    """The first rule that a wish breaks."""

    rule: int  # later rules are looked at only where this one holds
    text: str
    numbers: tuple[str, ...]  # those of the wish that could be changed; `text` begins with the first
    besides: str = ""  # another way out


def _problem(wish: _Wish, model: ModelOptions | None) -> _Problem | None:
    """The first rule that is broken, if any. Cheap: numbers that work are found by trying."""
    experts, tensor = wish.expert_parallel, wish.tensor_parallel
    if model is not None:
        if experts > 1 and model.moe.experts == 0:
            text = f"parallel.expert_parallel {experts} needs experts, and the model has none"
            return _Problem(0, text, ("expert_parallel",), "give it some with model.moe.experts")
        if experts > max(model.moe.experts, 1):
            text = (
                f"parallel.expert_parallel {experts} is more than the {model.moe.experts} experts of model.moe.experts"
            )
            return _Problem(1, text, ("expert_parallel",))
        if wish.context_parallel > 1 and not model.ksa:
            text = f"parallel.context_parallel {wish.context_parallel} shares the histories of summary attention"
            text += ", and the model has no pathway of it"
            return _Problem(2, text, ("context_parallel",), "give it one with model.ksa")
        if model.n_heads % tensor:
            text = f"parallel.tensor_parallel {tensor} does not divide the {model.n_heads} heads of model.n_heads"
            return _Problem(3, text, ("tensor_parallel",))
    degrees = [name for name in ("tensor_parallel", "context_parallel") if getattr(wish, name) > 1]
    needed = tensor * wish.context_parallel
    if wish.world_size < 1:
        return _Problem(4, f"a mesh of {wish.world_size} ranks cannot be", ("world_size",))
    if wish.world_size % needed:
        named = " x ".join(f"{name} {getattr(wish, name)}" for name in degrees)
        text = f"parallel.{named} needs a multiple of {needed} ranks, and there are {wish.world_size}"
        return _Problem(4, text, (*degrees, "world_size"))
    if wish.data_parallel % experts:
        text = f"parallel.expert_parallel {experts} does not divide the {wish.ranks}"
        return _Problem(5, text, ("expert_parallel", "world_size"))
    total, micro = wish.global_batch_size, wish.micro_batch_size
    if micro is not None and micro < 1:
        return _Problem(6, f"parallel.micro_batch_size {micro} holds no sample", ("micro_batch_size",))
    if total < wish.data_parallel:
        text = f"parallel.global_batch_size {total} is too small for {wish.ranks}"
        return _Problem(7, text, ("global_batch_size", "world_size"))
    return None


def _told(wish: _Wish, model: ModelOptions | None, problem: _Problem) -> str:
    """The problem, and the nearest numbers with which every rule holds; failing these, at least its own rule."""

    def all_rules(changed: _Wish) -> bool:
        return _problem(changed, model) is None

    def this_rule(changed: _Wish) -> bool:
        left = _problem(changed, model)
        return left is None or left.rule > problem.rule

    ways = _ways(wish, problem, all_rules) or _ways(wish, problem, this_rule)
    if problem.besides:
        ways.append(problem.besides)
    return f"{problem.text}: {', or '.join(ways)}." if ways else f"{problem.text}."


def _ways(wish: _Wish, problem: _Problem, works: Callable[[_Wish], bool]) -> list[str]:
    """Ways out, in words: for each number of the problem its nearest values, below and above, that work."""
    model_ranks = wish.tensor_parallel * wish.context_parallel
    steps = {
        "world_size": model_ranks * wish.expert_parallel,
        "global_batch_size": max(wish.world_size // model_ranks, 1),
    }
    ways = []
    for name in problem.numbers:
        wanted, step = getattr(wish, name), steps.get(name, 1)
        below, above = (wanted - 1) // step * step, (max(wanted, 0) // step + 1) * step
        if name not in steps:  # nothing above can work
            below = min(below, wish.global_batch_size if name == "micro_batch_size" else wish.world_size)
        down = range(below, 0, -step)[:SEARCHED]
        up = range(above, above + SEARCHED * step, step)
        found = [n for side in (down, up) for n in _first(side, wish, name, works)]
        if found:
            numbers = " or ".join(map(str, found))
            verb = "run with {} ranks" if name == "world_size" else "set it to {}"
            if name not in ("world_size", problem.numbers[0]):
                verb = f"set parallel.{name} to {{}}"
            ways.append(verb.format(numbers))
    return ways


def _first(numbers: Iterable[int], wish: _Wish, name: str, works: Callable[[_Wish], bool]) -> list[int]:
    return next(([n] for n in numbers if works(replace(wish, **{name: n}))), [])
