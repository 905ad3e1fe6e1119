"""Attention to ranges of text rows and of summary rows, tile by tile, in plain PyTorch on any device.

A tile is a few hundred query rows with the keys that any of them sees, in blocks; only the columns at the edges of a
block need a mask. Blocks of one tile share one softmax through running maxima and sums, and the backward pass computes
the scores again from the log-sum-exp (KSA, sections 4 and 4.1), so that memory grows with the rows alone. Scores are in
powers of 2: `exp2` takes the same time for every argument, where `exp` on a CPU takes 60 times as long to underflow.

Legend: T query rows, N keys of one kind, H query heads, G KV groups, K head width, Q query rows of a tile, J keys of a
block, F = H / G heads of one group.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from onetrain.model.attention import KeyValue
from onetrain.model.ksa.layout import Ranges
from onetrain.model.precision import wide

TILE = 256  # query rows: smaller tiles compute fewer masked pairs, larger ones make better matrix products
BLOCK = 2048  # keys whose scores exist at once
LOG2E = math.log2(math.e)


class Block(NamedTuple):
    """Keys [begin, end) of one kind; those of [clear_begin, clear_end) are seen by every row of the tile."""

    kind: int  # 0 text, 1 summary
    begin: int
    end: int
    clear_begin: int
    clear_end: int

    def masked_columns(self) -> list[slice]:
        """Columns that some row of the tile does not see, relative to `begin`."""
        columns = (slice(0, self.clear_begin - self.begin), slice(self.clear_end - self.begin, self.end - self.begin))
        return [part for part in columns if part.stop > part.start]


class Tile(NamedTuple):
    """Query rows [begin, end) and the blocks of keys that they see, text first: every row sees its own text."""

    begin: int
    end: int
    blocks: list[Block]


def tiles(ranges: Ranges, tile: int = TILE, block: int = BLOCK) -> list[Tile]:
    """The work list of both passes; kept with the ranges."""
    if ("blocked", tile, block) not in ranges.plans:
        ranges.plans["blocked", tile, block] = _plan(ranges, tile, block)
    return ranges.plans["blocked", tile, block]


def _plan(ranges: Ranges, tile: int, block: int) -> list[Tile]:
    rows = len(ranges.text_begin_T)
    if rows == 0:
        return []
    first = torch.arange(0, rows, tile)
    last = (first + tile).clamp_max(rows) - 1
    at_first, at_last = ([bound_T.cpu()[at].tolist() for bound_T in ranges.bounds] for at in (first, last))
    work = []
    for index, (begin, end) in enumerate(zip(first.tolist(), (last + 1).tolist(), strict=True)):
        blocks: list[Block] = []
        for kind in (0, 1):
            lo, clear_lo = at_first[2 * kind][index], at_last[2 * kind][index]
            clear_hi, hi = at_first[2 * kind + 1][index], at_last[2 * kind + 1][index]
            blocks += _blocks(kind, lo, hi, clear_lo, clear_hi, block)
        work.append(Tile(begin, end, blocks))
    return work


def _blocks(kind: int, lo: int, hi: int, clear_lo: int, clear_hi: int, size: int) -> Iterator[Block]:
    clear_lo, clear_hi = (clear_lo, clear_hi) if clear_lo < clear_hi else (hi, hi)  # else no key is seen by every row
    count = -(-(hi - lo) // size)
    for number in range(count):
        begin, end = lo + (hi - lo) * number // count, lo + (hi - lo) * (number + 1) // count
        yield Block(kind, begin, end, min(max(clear_lo, begin), end), min(max(clear_hi, begin), end))


def computed_pairs(work: Sequence[Tile]) -> int:
    """Scores that the tiles compute, masked ones included."""
    return sum((tile.end - tile.begin) * (block.end - block.begin) for tile in work for block in tile.blocks)


def seen_pairs(work: Sequence[Tile], ranges: Ranges) -> int:
    """Scores that the tiles compute and do not mask."""
    total = 0
    for tile in work:
        for block in tile.blocks:
            masked = sum(int(_hidden(ranges, tile, block, part).sum()) for part in block.masked_columns())
            total += (tile.end - tile.begin) * (block.end - block.begin) - masked
    return total


def blocked_attention(
    q_HTK: Tensor, text: KeyValue, summary: KeyValue, ranges: Ranges, tile: int = TILE, block: int = BLOCK
) -> tuple[Tensor, Tensor]:
    """Every query row attends to its ranges of text and summary rows, in one softmax.

    Keys and values are (G, N, K). Returns (H, T, K) in the dtype of `q_HTK`, and the log-sum-exp (H, T) of the scores,
    in fp32 at least and without gradient. Every row sees at least one text row.
    """
    inputs = (wide(q_HTK), *map(wide, text), *map(wide, summary))
    out_HTK, lse_HT = _Blocked.apply(*inputs, ranges, tiles(ranges, tile, block))
    return out_HTK.to(q_HTK.dtype), lse_HT


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_HTK: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
        *keys_values, ranges, work = inputs
        scale = LOG2E / math.sqrt(q_HTK.shape[-1])
        groups = keys_values[0].shape[0]
        q_GFTK = q_HTK.unflatten(0, (groups, -1))
        out_GFTK, lse_GFT = torch.empty_like(q_GFTK), q_GFTK.new_empty(q_GFTK.shape[:3])
        scratch = _Scratch(q_GFTK, work, 1)
        for tile in work:
            q_GXK = (q_GFTK[:, :, tile.begin : tile.end] * scale).flatten(1, 2)  # X = F * Q
            softmax = _Softmax(q_GXK)
            for block in tile.blocks:
                key_GJK, value_GJK = (keys_values[2 * block.kind + i][:, block.begin : block.end] for i in (0, 1))
                score_GXJ = torch.bmm(q_GXK, key_GJK.transpose(1, 2), out=scratch.scores(0, q_GXK, key_GJK))
                _mask(score_GXJ, ranges, tile, block)
                softmax.add(score_GXJ, value_GJK)
            y_GXK, lse_GX1 = softmax.result()
            shape = (groups, -1, tile.end - tile.begin)
            out_GFTK[:, :, tile.begin : tile.end] = y_GXK.view(*shape, q_HTK.shape[-1])
            lse_GFT[:, :, tile.begin : tile.end] = lse_GX1.view(shape)
        out_HTK, lse_HT = out_GFTK.flatten(0, 1), lse_GFT.flatten(0, 1)
        ctx.save_for_backward(q_HTK, *keys_values, out_HTK, lse_HT)
        ctx.ranges, ctx.work = ranges, work
        ctx.mark_non_differentiable(lse_HT)
        return out_HTK, lse_HT

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q_HTK, *keys_values, out_HTK, lse_HT = ctx.saved_tensors
        scale = LOG2E / math.sqrt(q_HTK.shape[-1])
        groups = keys_values[0].shape[0]
        q_GFTK, out_GFTK, grad_GFTK = (x.unflatten(0, (groups, -1)) for x in (q_HTK, out_HTK, gradients[0]))
        lse_GFT = (lse_HT * LOG2E).unflatten(0, (groups, -1))
        delta_GFT = (grad_GFTK * out_GFTK).sum(-1)
        dq_GFTK, d_keys_values = torch.empty_like(q_GFTK), [torch.zeros_like(x) for x in keys_values]
        scratch = _Scratch(q_GFTK, ctx.work, 2)
        for tile in ctx.work:
            rows = slice(tile.begin, tile.end)
            q_GXK = (q_GFTK[:, :, rows] * scale).flatten(1, 2)
            grad_GXK = grad_GFTK[:, :, rows].flatten(1, 2)
            lse_GX1, delta_GX1 = lse_GFT[:, :, rows].flatten(1)[..., None], delta_GFT[:, :, rows].flatten(1)[..., None]
            dq_GXK = torch.zeros_like(q_GXK)
            for block in tile.blocks:
                keys = slice(block.begin, block.end)
                key_GJK, value_GJK = (keys_values[2 * block.kind + i][:, keys] for i in (0, 1))
                d_key_GJK, d_value_GJK = (d_keys_values[2 * block.kind + i][:, keys] for i in (0, 1))
                score_GXJ = torch.bmm(q_GXK, key_GJK.transpose(1, 2), out=scratch.scores(0, q_GXK, key_GJK))
                _mask(score_GXJ, ctx.ranges, tile, block)
                probability_GXJ = score_GXJ.sub_(lse_GX1).exp2_()
                d_value_GJK.baddbmm_(probability_GXJ.transpose(1, 2), grad_GXK)
                d_score_GXJ = torch.bmm(grad_GXK, value_GJK.transpose(1, 2), out=scratch.scores(1, q_GXK, key_GJK))
                d_score_GXJ.sub_(delta_GX1).mul_(probability_GXJ)
                dq_GXK.baddbmm_(d_score_GXJ, key_GJK)
                d_key_GJK.baddbmm_(d_score_GXJ.transpose(1, 2), q_GXK, alpha=1 / LOG2E)
            dq_GFTK[:, :, rows] = dq_GXK.mul_(scale / LOG2E).view(groups, -1, tile.end - tile.begin, q_HTK.shape[-1])
        return dq_GFTK.flatten(0, 1), *d_keys_values, None, None


class _Softmax:
    """A softmax-weighted sum of values whose scores come block by block."""

    def __init__(self, q_GXK: Tensor) -> None:
        self.peak_GX1 = torch.full_like(
            q_GXK[..., :1], torch.finfo(q_GXK.dtype).min
        )  # finite: a row may see nothing yet
        self.total_GX1, self.sum_GXK = torch.zeros_like(self.peak_GX1), torch.zeros_like(q_GXK)

    def add(self, score_GXJ: Tensor, value_GJK: Tensor) -> None:
        """Consumes the scores."""
        peak_GX1 = torch.maximum(self.peak_GX1, score_GXJ.amax(-1, keepdim=True))
        shrink_GX1 = self.peak_GX1.sub_(peak_GX1).exp2_()
        weight_GXJ = score_GXJ.sub_(peak_GX1).exp2_()
        self.total_GX1.mul_(shrink_GX1).add_(weight_GXJ.sum(-1, keepdim=True))
        self.sum_GXK.mul_(shrink_GX1).baddbmm_(weight_GXJ, value_GJK)
        self.peak_GX1 = peak_GX1

    def result(self) -> tuple[Tensor, Tensor]:
        """The sum (G, X, K) and the log-sum-exp, to base e, of all scores (G, X, 1)."""
        return self.sum_GXK / self.total_GX1, (self.total_GX1.log2() + self.peak_GX1) / LOG2E


class _Scratch:
    """Memory for the scores of one block, allocated once."""

    def __init__(self, q_GFTK: Tensor, work: Sequence[Tile], count: int) -> None:
        sizes = [(tile.end - tile.begin) * (block.end - block.begin) for tile in work for block in tile.blocks]
        self.flat = q_GFTK.new_empty(count, q_GFTK.shape[0] * q_GFTK.shape[1] * max(sizes, default=0))

    def scores(self, number: int, q_GXK: Tensor, key_GJK: Tensor) -> Tensor:
        """(G, X, J)."""
        shape = (*q_GXK.shape[:2], key_GJK.shape[1])
        return self.flat[number, : math.prod(shape)].view(shape)


def _mask(score_GXJ: Tensor, ranges: Ranges, tile: Tile, block: Block) -> None:
    """Adds -inf where a row does not see a key; adding is several times faster than filling by a mask."""
    for part in block.masked_columns():
        hidden_QJ = _hidden(ranges, tile, block, part)
        bias_QJ = score_GXJ.new_zeros(hidden_QJ.shape).masked_fill_(hidden_QJ, -math.inf)
        score_GXJ[..., part].unflatten(1, (-1, tile.end - tile.begin)).add_(bias_QJ)


def _hidden(ranges: Ranges, tile: Tile, block: Block, part: slice) -> Tensor:
    """(Q, J) of some columns of a block: the keys that a row does not see."""
    of_kind = ranges.bounds[2 * block.kind : 2 * block.kind + 2]
    begin_Q1, end_Q1 = (bound_T[tile.begin : tile.end, None] for bound_T in of_kind)
    key_J = torch.arange(block.begin + part.start, block.begin + part.stop, device=begin_Q1.device)
    return (key_J < begin_Q1) | (key_J >= end_Q1)
