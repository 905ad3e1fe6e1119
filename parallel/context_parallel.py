"""Context parallelism: ranks share the histories of long-context pathways, from outside.

Every rank of a group reads the same samples and computes a part of the packed rows, of whole chunks. A layer with a
window takes one window of text rows and the summaries from earlier ranks, a full layer all earlier text rows of the
history; a summary's own attention stays at home, as do norms, projections and FFNs. The states that the decoder reads
go to every rank, and all else (features, decoder, loss) every rank computes alike.

All ranks know the whole layout, so that no sizes travel. Exchanges are differentiable, and a gradient goes back the way
its rows came. Since every rank of the group has the whole loss, gradients over the group add up to `context_parallel`
times the loss's, which DeepSpeed's mean over data and context ranks divides by.

Legend: A rows [text; summaries] of a part, N rows that a rank gets, E elements of a row, T text rows, H heads, G KV
groups, K head width, D width, P rows asked for, U different ones of them or histories.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from onetrain.model.attention import KeyValue
from onetrain.model.ksa.kernels import attention
from onetrain.model.ksa.layout import Layout, Ranges, Window
from onetrain.model.ksa.part import Part, Sequence
from onetrain.model.ksa.stack import KSAStack
from onetrain.model.precision import wide
from onetrain.parallel.errors import ParallelError
from onetrain.parallel.mesh import Mesh


def start(mesh: Mesh, timeout_s: float) -> dist.ProcessGroup:
    """The group of ranks that share this rank's histories; every rank takes part. `timeout_s` bounds a collective."""
    timeout, mine = timedelta(seconds=timeout_s), None
    for ranks in mesh.groups("context"):
        group = dist.new_group(ranks, timeout=timeout)
        mine = group if dist.get_rank() in ranks else mine
    assert mine is not None  # groups of a kind hold every rank
    return mine


def apply(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Lets every stack of `model` work on this rank's part of its histories. Parameters stay whole, and their names."""
    for stack in stacks(model):
        stack.sequence = SharedSequence(group)


def check(model: nn.Module) -> None:
    """Raises ParallelError for a model without histories to share."""
    if not stacks(model):
        raise ParallelError(
            f"{type(model).__name__} has no pathway of summary attention whose histories ranks could share: give it "
            "one with model.ksa, or set parallel.context_parallel to 1."
        )


@contextmanager
def alone(model: nn.Module) -> Iterator[None]:
    """Inside, this rank computes whole histories, so that ranks may run different numbers of forwards."""
    shared = [(stack, stack.sequence) for stack in stacks(model)]
    for stack, _ in shared:
        stack.sequence = Sequence()
    try:
        yield
    finally:
        for stack, sequence in shared:
            stack.sequence = sequence


def stacks(model: nn.Module) -> list[KSAStack]:
    """The stacks of summary attention of a model, in the order of its pathways."""
    return [module for module in model.modules() if isinstance(module, KSAStack)]


@dataclass(frozen=True)
class Share(Part):
    """The part of one rank, and those of all ranks of its group."""

    rank: int
    parts: tuple[Part, ...]
    routes: dict[Window, "Fetch"] = field(default_factory=dict, compare=False)  # found once for all layers of a kind


class SharedSequence(Sequence):
    """Histories that the ranks of a group share."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group = group

    def part(self, layout: Layout) -> Share:
        """This rank's share; it may be empty."""
        parts, rank = cut(layout, self.group.size()), self.group.rank()
        own = parts[rank]
        return Share(layout, own.text_begin, own.text_end, own.summary_begin, own.summary_end, rank, parts)

    def attend(
        self, q_HTK: Tensor, text: KeyValue, summary: KeyValue, part: Part, window: Window, kernel: str
    ) -> Tensor:
        """As of the whole layout; takes from other ranks the rows that `fetch` says, in one exchange."""
        assert isinstance(part, Share)
        if window not in part.routes:
            part.routes[window] = fetch(part, window)
        route, ranges, n_text = part.routes[window]
        groups, width = text.key_BGNK.shape[0], text.key_BGNK.shape[-1]
        kv_GAE = torch.cat([torch.cat(pair, dim=1) for pair in zip(text, summary, strict=True)], dim=-1)
        got_NE = exchange(kv_GAE.transpose(0, 1).flatten(1), route, self.group)
        if part.n_text == 0:
            return q_HTK + got_NE.sum()  # nothing, but the backward pass comes by the exchange
        key_GNK, value_GNK = got_NE.unflatten(1, (groups, -1)).transpose(0, 1).split(width, dim=-1)
        seen, old = (KeyValue(key_GNK[:, rows], value_GNK[:, rows]) for rows in (slice(n_text), slice(n_text, None)))
        return attention(q_HTK, seen, old, ranges, kernel)

    def states(self, x_AD: Tensor, part: Part, rows_P: Tensor) -> Tensor:
        """(P, D) on every rank: rows of [all text; all summaries] of the layout, wherever they are computed."""
        assert isinstance(part, Share)
        rows_U, place_P = rows_P.unique(return_inverse=True)
        return exchange(x_AD, gather(part, rows_U), self.group)[place_P]

    def history_sums(self, value_T: Tensor, part: Part) -> Tensor:
        """(U,) on every rank: of every history the sum over its text rows, wherever they are computed."""
        return _Sum.apply(super().history_sums(value_T, part), self.group)


def cut(layout: Layout, ranks: int) -> tuple[Part, ...]:
    """The part of every rank: text rows in order, cut at the starts of chunks nearest to equal shares."""
    started_U = -(-layout.length_U // layout.chunk)  # chunks, a last partial one among them
    first_U = started_U.cumsum(0) - started_U
    chunk_Z = torch.arange(int(started_U.sum())) - first_U.repeat_interleave(started_U)
    start_Z = layout.text_start_U.repeat_interleave(started_U) + chunk_Z * layout.chunk
    whole_Z = chunk_Z < (layout.length_U // layout.chunk).repeat_interleave(started_U)
    start_Z = torch.cat((start_Z, torch.tensor([layout.n_text])))
    summary_Z = torch.cat((torch.zeros(1, dtype=torch.int64), whole_Z.cumsum(0))) * layout.summaries
    wish = torch.arange(1, ranks) * layout.n_text / ranks
    after = torch.searchsorted(start_Z, wish)
    before = (after - 1).clamp_min(0)
    nearest = torch.where(wish - start_Z[before] <= start_Z[after] - wish, before, after)
    ends = torch.cat((torch.tensor([0]), nearest, torch.tensor([len(start_Z) - 1])))
    text, summary = start_Z[ends].tolist(), summary_Z[ends].tolist()
    return tuple(Part(layout, *text[r : r + 2], *summary[r : r + 2]) for r in range(ranks))


class Needs(NamedTuple):
    """Rows whose keys and values a part reads, in row numbers of the layout."""

    text: range
    summary: range


def needs(parts: tuple[Part, ...], window: Window) -> list[Needs]:
    """Of every part. Text rows are exactly those that it sees, its own among them.

    Summary rows are those from the first to the last that it sees. Between them may lie the last window of a history
    that ends in the part, which nothing sees any more.
    """
    rows = [row for part in parts if part.n_text for row in (part.text_begin, part.text_end - 1)]
    if not rows:
        return [Needs(range(0), range(0)) for _ in parts]
    bounds = torch.stack(parts[0].layout.ranges(window).bounds)[:, rows].T.tolist()
    found = []
    for part in parts:
        if part.n_text == 0:
            found.append(Needs(range(0), range(0)))
            continue
        (text_begin, _, summary_begin, _), (_, text_end, _, summary_end), *bounds = bounds
        found.append(Needs(range(text_begin, text_end), range(summary_begin, summary_end)))
    return found


class Route(NamedTuple):
    """Which rows go where: the same plan on every rank, seen from one of them."""

    send: list[Tensor]  # of every peer, the own rows (of A) that it gets, each once
    received: list[int]  # rows that come from every peer
    order_N: Tensor  # of the rows in the order of peers, those that are wanted, one after the other


class Fetch(NamedTuple):
    """What attention over a part needs."""

    route: Route
    ranges: Ranges  # of the part's text rows, in the numbers of the rows that come
    n_text: int  # of which so many are text, and the rest summaries


def fetch(part: Share, window: Window) -> Fetch:
    """From every rank the keys and values that this one's rows see, text first."""
    wanted, device = needs(part.parts, window), part.layout.device
    own = wanted[part.rank]
    send = [
        torch.cat(
            [
                _numbers(_both(of_peer.text, _text(part)), -part.text_begin, device),
                _numbers(_both(of_peer.summary, _summary(part)), part.n_text - part.summary_begin, device),
            ]
        )
        for of_peer in wanted
    ]
    counts = [(len(_both(own.text, _text(peer))), len(_both(own.summary, _summary(peer)))) for peer in part.parts]
    text, summary, come = [], [], 0
    for n_text, n_summary in counts:
        text.append(range(come, come + n_text))
        summary.append(range(come + n_text, come + n_text + n_summary))
        come += n_text + n_summary
    order_N = torch.cat([_numbers(rows, 0, device) for rows in (*text, *summary)])
    first = (own.text.start, own.text.start, own.summary.start, own.summary.start)
    ranges = Ranges(*(bound_T - n for bound_T, n in zip(part.ranges(window).bounds, first, strict=True)))
    return Fetch(Route(send, [sum(pair) for pair in counts], order_N), ranges, len(own.text))


def gather(part: Share, rows_U: Tensor) -> Route:
    """Rows of [all text; all summaries], each once, from whichever rank computes them, to all."""
    n_text = part.layout.n_text
    is_text_U = rows_U < n_text
    ends = [torch.tensor(bounds, device=rows_U.device) for bounds in zip(*map(_ends, part.parts[:-1]), strict=True)]
    text_end, summary_end = ends or [torch.empty(0, dtype=torch.int64, device=rows_U.device)] * 2
    of_text_U = torch.searchsorted(text_end, rows_U, right=True)
    of_summary_U = torch.searchsorted(summary_end, rows_U - n_text, right=True)
    owner_U = torch.where(is_text_U, of_text_U, of_summary_U)
    local_U = torch.where(is_text_U, rows_U - part.text_begin, rows_U - n_text - part.summary_begin + part.n_text)
    mine = local_U[owner_U == part.rank]
    order_U = torch.empty_like(rows_U)
    order_U[owner_U.argsort(stable=True)] = torch.arange(len(rows_U), device=rows_U.device)
    return Route([mine] * len(part.parts), owner_U.bincount(minlength=len(part.parts)).tolist(), order_U)


def exchange(x_AE: Tensor, route: Route, group: dist.ProcessGroup) -> Tensor:
    """The wanted rows of all ranks of the group, (N, E); every rank takes part, in both passes."""
    return _Exchange.apply(x_AE, route, group)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_AE: Tensor, route: Route, group: dist.ProcessGroup) -> Tensor:
        ctx.route, ctx.group, ctx.rows = route, group, len(x_AE)
        sent = [len(rows) for rows in route.send]
        return _all_to_all(x_AE[torch.cat(route.send)], sent, route.received, group)[route.order_N]

    @staticmethod
    def backward(ctx: Any, grad_NE: Tensor) -> tuple[Tensor, None, None]:
        route: Route = ctx.route
        sent = [len(rows) for rows in route.send]
        by_peer_NE = torch.empty_like(grad_NE, memory_format=torch.contiguous_format)
        by_peer_NE[route.order_N] = grad_NE
        back = _all_to_all(by_peer_NE, route.received, sent, ctx.group).split(sent)
        grad_AE = wide(grad_NE.new_zeros(ctx.rows, grad_NE.shape[1]))
        for rows, part in zip(route.send, back, strict=True):  # one peer after the other: sums in one order
            grad_AE[rows] += part
        return grad_AE.to(grad_NE.dtype), None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def _all_to_all(rows_NE: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    """Rows in the order of the peers they go to; returns rows in the order of the peers they come from."""
    got_NE = rows_NE.new_empty(sum(received), rows_NE.shape[1])
    dist.all_to_all_single(got_NE, rows_NE, received, sent, group=group)
    return got_NE


def _text(part: Part) -> range:
    return range(part.text_begin, part.text_end)


def _summary(part: Part) -> range:
    return range(part.summary_begin, part.summary_end)


def _ends(part: Part) -> tuple[int, int]:
    return part.text_end, part.summary_end


def _both(one: range, other: range) -> range:
    """What lies in both."""
    begin = max(one.start, other.start)
    return range(begin, max(min(one.stop, other.stop), begin))


def _numbers(rows: range, shift: int, device: torch.device) -> Tensor:
    return torch.arange(rows.start + shift, rows.stop + shift, device=device)
