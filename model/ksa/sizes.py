"""How much a history costs: the rows, score pairs, cache rows and parameters of a stack, in closed form.

Legend: w = width of the stack, C = chunk, W = window.
"""

from collections.abc import Sequence
from typing import NamedTuple

from onetrain.model.ksa.layout import score_pairs
from onetrain.model.lifelong import read_counts
from onetrain.model.options import KSAOptions


class StackWork(NamedTuple):
    """Sums over the histories that one stack reads; `pairs` are seen by one head of one layer, own chunks included."""

    text: float = 0.0  # rows: events, or codes where they are flattened
    summaries: float = 0.0  # rows
    pairs: float = 0.0  # of a KSA layer
    full_pairs: float = 0.0  # of a full layer
    read: float = 0.0  # rows that the decoder reads

    def times(self, count: float) -> "StackWork":
        """Of so many histories like this one."""
        return StackWork(*(count * value for value in self))

    def dot(self, other: "StackWork") -> float:
        """Costs of one each times counts."""
        return sum(mine * theirs for mine, theirs in zip(self, other, strict=True))


def stack_work(length: int, options: KSAOptions) -> StackWork:
    """One history of `length` events."""
    chunk, summaries = options.chunk, options.summaries
    return StackWork(
        text=length,
        summaries=summaries * (length // chunk),
        pairs=score_pairs(length, chunk, summaries, options.window),
        full_pairs=score_pairs(length, chunk, 0 if options.bypass_full else summaries, "full"),
        read=sum(read_counts(length, options)),
    )


def total(work: Sequence[StackWork]) -> StackWork:
    """The sum of one or more."""
    return StackWork(*map(sum, zip(*work, strict=True)))


def stack_pairs(length: int, options: KSAOptions) -> tuple[int, int]:
    """Score pairs of one head over all layers, and those of causal attention in as many layers."""
    one = stack_work(length, options)
    full = full_layers(options)
    pairs = (len(options.layers) - full) * one.pairs + full * one.full_pairs
    return round(pairs), len(options.layers) * (length * (length + 1) // 2)


def cache_rows(length: int, options: KSAOptions) -> tuple[int, int]:
    """Rows of keys and values of one KV group that a decode keeps, over all layers, and those of full attention.

    A KSA layer: the last W chunks, the current one, and the summaries of all complete ones (KSA, section 5.3, without
    its scratch rows). A full layer: all text.
    """
    window = min(length, (options.window + 1) * options.chunk) + options.summaries * (length // options.chunk)
    full = full_layers(options)
    return (len(options.layers) - full) * window + full * length, len(options.layers) * length


def full_layers(options: KSAOptions) -> int:
    """Layers of causal attention over all text."""
    return options.layers.count("full")


def own_projections(options: KSAOptions) -> int:
    """Layers whose summary tokens have projections of their own."""
    return sum(options.projects_summaries(kind) for kind in options.layers)


def projections(options: KSAOptions) -> int:
    """W_Q, W_K and W_V of one kind of token."""
    return options.width * (options.width + 2 * options.groups * options.d_head)


def stack_parameters(options: KSAOptions) -> int:
    """Of all layers: projections, output, norms and FFN. The summary tokens are a table, and not among them."""
    w, layers = options.width, len(options.layers)
    one = projections(options) + w * w + 2 * w + options.qk_norm * 2 * options.d_head + 3 * w * options.ffn_width
    return layers * one + own_projections(options) * projections(options)
