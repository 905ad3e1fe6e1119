"""Golden runs: one model trained from the same weights on the same global batches under every parallel mix, held
against one process step by step. `python benchmarks/golden.py` prints the table, test_golden.py checks it.

fp32 on CPU, dropout 0, active clipping. Target weights are uneven, and some ranks have few or no targets that count.

Legend: B rows of the global batch, T slots, N events, M targets that count, K experts per token, Z sparse blocks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from onetrain.model.build import build
from onetrain.model.decoder import SidDecoder
from onetrain.model.inputs import Context, Events, Targets
from onetrain.model.loss import training_loss
from onetrain.model.moe import Routing, routers
from onetrain.model.options import KSAOptions, ModelOptions, MoEOptions, MTPOptions, Vocabulary
from onetrain.parallel.engine import Engine
from onetrain.parallel.optimizer_state import VALUE, gather
from onetrain.parallel.options import OptimizerOptions, ParallelOptions
from onetrain.parallel.process_group import Ranks

STEPS = 30
ROWS, SLOTS, EVENTS = 8, 3, 6
VOCABULARY = Vocabulary(codes=(16, 12, 20), features={"item": 40}, pathways={"history": EVENTS})
Batch = tuple[Context, Targets]

DENSE = ModelOptions(d_model=32, n_layers=3, n_heads=4, g_kv=2, d_ff=48, embed_dim=8, features=("sid", "item"))
SPARSE = replace(DENSE, moe=MoEOptions(8, 2, shared=1, d_expert=16, first_dense=1, bias_rate=0.01))
MODELS = {
    "dense": DENSE,
    "dense + MTP": replace(DENSE, cross_attention="projected_kv", output_gate=True, mtp=MTPOptions(enabled=True)),
    "sparse": SPARSE,
    "sparse + auxiliary": replace(SPARSE, moe=replace(SPARSE.moe, scale=2.5, sequence_loss=0.05, z_loss=0.01)),
    "sparse + MTP": replace(
        SPARSE, moe=replace(SPARSE.moe, score="softmax", groups=4, top_groups=2), mtp=MTPOptions(enabled=True)
    ),
}
SUMMARIES = KSAOptions(width=16, heads=2, layers=("ksa", "full"), chunk=1, window=1, d_ff=24)
MODELS |= {f"lifelong, {name}": replace(MODELS[name], ksa={"history": SUMMARIES}) for name in ("dense", "sparse")}
OPTIMIZERS = {
    "AdamW": OptimizerOptions("adamw", 3e-3, 1e-3, weight_decay=0.1, schedule="constant", warmup_steps=4),
    "SGD": OptimizerOptions("sgd", 0.3, 0.1, weight_decay=0.0, schedule="constant", warmup_steps=4),
}
# `stage3_param_persistence_threshold`: else stage 3 keeps parameters as small as these whole
ONE = ParallelOptions(
    global_batch_size=ROWS,
    gradient_clipping=0.3,
    deepspeed={"zero_optimization": {"stage3_param_persistence_threshold": 0}},
)


class Tolerance(NamedTuple):
    """How far final weights may lie from those of one process, and why."""

    weights: float
    reason: str


@dataclass(frozen=True)
class Run:
    """One mix to hold against one process."""

    name: str
    world_size: int
    parallel: ParallelOptions
    models: tuple[str, ...] = ("sparse",)


@dataclass(frozen=True)
class Trained:
    """What a run did."""

    history: list[tuple[float, float]]  # loss and gradient norm of every step
    weights: dict[str, Tensor]  # final, and the routers' biases
    expert_ZMK: list[Tensor]  # of every step: the experts of every token in the order of samples, sorted


class Row(NamedTuple):
    """A run held against one process."""

    run: str
    model: str
    optimizer: str
    ranks: int
    loss: float  # worst relative deviation over the steps
    norm: float
    weights: float  # worst deviation of a final weight or bias
    tolerance: Tolerance
    flips: int  # routing decisions that differ
    decisions: int


def runs() -> list[Run]:
    """Every mix of the table."""
    every = ("sparse", "sparse + auxiliary", "sparse + MTP")
    share, cut_layers = replace(ONE, expert_parallel=2), replace(ONE, tensor_parallel=2)
    found = [
        Run("DP2", 2, ONE, ("dense", *every)),
        Run("EP2", 2, share, every),
        Run("accumulation 2", 1, replace(ONE, micro_batch_size=4), ("sparse + auxiliary",)),
        Run("EP2, accumulation 2", 2, replace(share, micro_batch_size=2), ("sparse + auxiliary",)),
        Run("EP2 x DP2", 4, share, ("sparse", "sparse + auxiliary")),
        Run("EP2, recomputation", 2, replace(share, checkpoint_blocks="all"), ("sparse + auxiliary",)),
        Run("EP2, chunked loss", 2, replace(share, loss_chunk=2), ("sparse + MTP",)),
        Run("ZeRO 2 x EP2, offload", 2, replace(share, zero_stage=2, offload_optimizer=True)),
        Run("TP2", 2, cut_layers, ("dense", "dense + MTP")),
        Run("TP2 x DP2", 4, cut_layers, ("dense", "dense + MTP")),
    ]
    for stage in (1, 2, 3):
        found.append(Run(f"ZeRO {stage} x EP2", 2, replace(share, zero_stage=stage), ("sparse", "sparse + auxiliary")))
        found.append(Run(f"ZeRO {stage} x EP2 x DP2", 4, replace(share, zero_stage=stage)))
        found.append(Run(f"ZeRO {stage} x TP2 x DP2", 4, replace(cut_layers, zero_stage=stage), ("dense",)))
    return found


def new_model(options: ModelOptions, vocabulary: Vocabulary = VOCABULARY) -> SidDecoder:
    """Weights far from their initial values, so that gradients are large and clipping is active."""
    torch.manual_seed(0)
    model = build(options, vocabulary)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5)
    return model


def global_batch(step: int, rows: int = ROWS) -> Batch:
    """Histories of uneven length; in some steps the second half of the rows, or all rows but one, have no target."""
    g = torch.Generator().manual_seed(step)

    def ids(size: int, *shape: int) -> Tensor:
        return torch.randint(size, shape, generator=g)

    weight_BT = torch.rand(rows, SLOTS, generator=g) + 0.2
    weight_BT[torch.rand(rows, SLOTS, generator=g) < 0.3] = 0
    weight_BT[0, 0] = 1.5
    if step % 3 == 1:
        weight_BT[rows // 2 :] = 0
    if step % 7 == 3:
        weight_BT[1:] = 0
    index_BN = torch.arange(EVENTS).expand(rows, -1)
    sid_BNL = torch.stack([ids(size, rows, EVENTS) for size in VOCABULARY.codes], dim=-1)
    events = Events(sid_BNL, index_BN, ids(EVENTS + 1, rows), {"item": ids(40, rows, EVENTS)})
    sid_BTL = torch.stack([ids(size, rows, SLOTS) for size in VOCABULARY.codes], dim=-1)
    return Context({"history": events}), Targets(sid_BTL, ids(EVENTS + 2, rows, SLOTS), weight_BT)


def cut(batch: Batch, rows: slice) -> Batch:
    """Some rows of a batch."""
    context, targets = batch
    events = context.sequences["history"]
    ids = {name: values[rows] for name, values in events.features.items()}
    part = Events(events.sid_BNL[rows], events.index_BN[rows], events.length_B[rows], ids)
    return Context({"history": part}), Targets(targets.sid_BTL[rows], targets.end_BT[rows], targets.weight_BT[rows])


def trimmed(batch: Batch) -> Batch:
    """Without the padding that only other rows of the global batch need: every rank collates its own."""
    context, targets = batch
    events = context.sequences["history"]
    longest = max(int(events.length_B.max()), 1)
    last = (targets.weight_BT > 0).nonzero()
    slots = int(last[:, 1].max()) + 1 if len(last) else 1
    ids = {name: values[:, :longest] for name, values in events.features.items()}
    short = Events(events.sid_BNL[:, :longest], events.index_BN[:, :longest], events.length_B, ids)
    parts = (targets.sid_BTL[:, :slots], targets.end_BT[:, :slots], targets.weight_BT[:, :slots])
    return Context({"history": short}), Targets(*parts)


def share(batch: Batch, engine: Engine) -> list[Batch]:
    """The micro batches of a global batch that this rank runs; where it does not divide, the first have a row more."""
    mesh, steps = engine.mesh, engine.mesh.accumulation_steps
    parts = torch.arange(len(batch[1].weight_BT)).tensor_split(mesh.data_parallel * steps)
    first = mesh.data_rank(engine.ranks.rank) * steps
    return [trimmed(cut(batch, slice(int(part[0]), int(part[-1]) + 1))) for part in parts[first : first + steps]]


def loss_fn(module: nn.Module, batch: Batch, chunk: int | None = None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """As the training loop's."""
    assert isinstance(module, SidDecoder)
    return training_loss(module(*batch), module.options, chunk)


def weight_fn(batch: Batch) -> float:
    return float(batch[1].weight_BT.sum())


class RoutingLog:
    """The experts that every router chooses, as its forward passes go by."""

    def __init__(self, model: nn.Module) -> None:
        self.chosen: list[list[Tensor]] = []
        self.hooks = []
        for router in routers(model):
            calls: list[Tensor] = []
            self.chosen.append(calls)
            self.hooks.append(router.register_forward_hook(partial(self._note, calls)))

    def __enter__(self) -> "RoutingLog":
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    @staticmethod
    def _note(calls: list[Tensor], _: nn.Module, __: Any, routing: Routing) -> None:
        if torch._C._current_graph_task_id() == -1:  # else a backward pass repeats the block
            calls.append(routing.expert_MK)

    def take(self, ranks: Ranks, mine: bool) -> Tensor | None:
        """(Z, M, K) of one step, over ranks in their order, sorted within a token; None without experts.

        Of ranks that read the same samples only one says `mine`. Every rank takes part.
        """
        if not self.chosen:
            return None
        local = torch.stack([torch.cat(calls).sort(1).values for calls in self.chosen])
        for calls in self.chosen:
            calls.clear()
        parts: list[Any] = [None] * ranks.world_size
        dist.all_gather_object(parts, local if mine else local[:, :0])
        return torch.cat(parts, dim=1)


def train(
    ranks: Ranks,
    model: SidDecoder,
    parallel: ParallelOptions,
    optimizer: OptimizerOptions,
    batch_of: Callable[[int], Batch],
    steps: int,
) -> Trained | None:
    """A run under the engine; the result is on rank 0."""
    torch.use_deterministic_algorithms(True)
    engine = Engine(model, parallel, optimizer, ranks, steps)
    result = go_on(engine, batch_of, steps)
    engine.close()
    return result


def go_on(engine: Engine, batch_of: Callable[[int], Batch], steps: int) -> Trained | None:
    """The next steps of an engine; the result is on rank 0."""
    ranks, history, chosen = engine.ranks, [], []
    replica = engine.mesh.replica_ranks
    loss = partial(loss_fn, chunk=engine.options.loss_chunk)
    with RoutingLog(engine.module) as log:
        for step in range(engine.step, engine.step + steps):
            result = engine.train_step(share(batch_of(step), engine), loss, weight_fn)
            history.append((result.loss, result.grad_norm))
            of_step = log.take(ranks, ranks.rank % replica == 0)
            chosen += [] if of_step is None else [of_step]
    weights = gather(engine).get(VALUE)
    biases = {f"bias {n}": r.e_score_correction_bias.clone() for n, r in enumerate(routers(engine.module))}
    return Trained(history, {**weights, **biases}, chosen) if weights else None


def train_all(ranks: Ranks, asked: Sequence[tuple[str, str, ParallelOptions]]) -> list[Trained | None]:
    """Runs of (model, optimizer, mix), one after the other."""
    return [
        train(ranks, new_model(MODELS[model]), parallel, OPTIMIZERS[name], global_batch, STEPS)
        for model, name, parallel in asked
    ]


def train_plainly(model_name: str, optimizer_name: str, steps: int = STEPS) -> Trained:
    """The same without the engine: a torch loop with its own groups, learning rates, clipping and balancing."""
    torch.use_deterministic_algorithms(True)
    options, wish = MODELS[model_name], OPTIMIZERS[optimizer_name]
    model = new_model(options)
    tables = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    groups: list[dict[str, Any]] = []
    for name, parameter in model.named_parameters():
        peak = wish.embedding_learning_rate if name in tables else wish.learning_rate
        decay = wish.weight_decay if parameter.dim() > 1 and name not in tables else 0.0
        groups.append({"params": [parameter], "peak": peak, "weight_decay": decay})
    optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=1.0)
    if wish.name == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=1.0, betas=wish.betas, eps=wish.eps)
    log, history, chosen = RoutingLog(model), [], []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * min(1.0, (step + 1) / wish.warmup_steps)
        batch = global_batch(step)
        loss = training_loss(model(*batch), options).loss / batch[1].weight_BT.sum()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), ONE.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        of_step = [torch.cat(calls) for calls in log.chosen]
        for router, expert_MK, calls in zip(routers(model), of_step, log.chosen, strict=True):
            load_E = torch.tensor([int((expert_MK == expert).sum()) for expert in range(options.moe.experts)]).double()
            router.e_score_correction_bias += options.moe.bias_rate * (load_E.mean() - load_E).sign().float()
            calls.clear()
        chosen += [torch.stack(of_step).sort(2).values] if of_step else []
        history.append((float(loss.detach()), float(norm)))
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    biases = {f"bias {n}": router.e_score_correction_bias for n, router in enumerate(routers(model))}
    return Trained(history, {**weights, **biases}, chosen)


def tolerance(optimizer: str) -> Tolerance:
    """Of final weights."""
    if optimizer == "SGD":
        return Tolerance(1e-6, "sums in another order: an epsilon of fp32 (1.2e-7) for weights near 1, a few times")
    return Tolerance(
        1e-4, "AdamW divides by the root of the second moment: where a gradient is near 0, its rounding is a step"
    )


def compare(run: str, model: str, optimizer: str, ranks: int, ours: Trained, one: Trained) -> Row:
    """A run held against one process."""
    loss, norm = (torch.tensor(ours.history).double() / torch.tensor(one.history).double() - 1).abs().amax(0).tolist()
    assert ours.weights.keys() == one.weights.keys()
    weights = max(float((ours.weights[name] - value).abs().max()) for name, value in one.weights.items())
    pairs = list(zip(ours.expert_ZMK, one.expert_ZMK, strict=True))
    flips = sum(int((mine != theirs).any(2).sum()) for mine, theirs in pairs)
    decisions = sum(theirs.shape[0] * theirs.shape[1] for _, theirs in pairs)
    return Row(run, model, optimizer, ranks, loss, norm, weights, tolerance(optimizer), flips, decisions)
