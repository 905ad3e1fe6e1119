"""Attention to ranges of text rows and of summary rows, tile by tile, in plain PyTorch on any device.

A tile is a couple of hundred query rows with the keys that any of them sees, in blocks; only columns at the edges of a
block need a mask. The backward pass computes the scores again from the log-sum-exp (KSA, sections 4 and 4.1), so that
memory grows with the rows alone.

What is unusual is for speed, and was measured by benchmarks/ksa.py. Weights are powers of 2: `exp2` takes the same time
for every argument, `exp` on a CPU 60 times as long where it underflows. They are not scaled by a row's largest score
where norms bound all scores, which saves two passes over them. Masks are added, not filled in. The backward pass works
on transposed scores, and takes log-sum-exp and delta off in the matrix products themselves, as one more column.

Legend: T query rows, N keys of one kind, H query heads, G KV groups, F = H / G heads of one group, K head width,
E = K + 1, Q query rows of a tile, X = F * Q, J keys of a block.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from onetrain.model.attention import KeyValue
from onetrain.model.ksa.layout import Ranges
from onetrain.model.precision import wide

TILE = 192  # query rows: smaller tiles compute fewer masked pairs, larger ones make better matrix products
BLOCK = 1536  # keys whose scores exist at once
LOG2E = math.log2(math.e)
SAFE_SCORE = 60.0  # 2^60 times any number of keys is far from the ends of fp32


class Edge(NamedTuple):
    """Columns of a block that some rows of its tile do not see."""

    columns: slice
    bias_QJ: Tensor  # 0 where seen, -inf where not
    bias_JQ: Tensor


class Block(NamedTuple):
    """Keys [begin, end) of one kind."""

    kind: int  # 0 text, 1 summary
    begin: int
    end: int
    edges: tuple[Edge, ...]

    @property
    def keys(self) -> slice:
        """Of their kind."""
        return slice(self.begin, self.end)


class Tile(NamedTuple):
    """Query rows [begin, end) and the blocks of keys that they see."""

    begin: int
    end: int
    blocks: tuple[Block, ...]

    @property
    def rows(self) -> slice:
        """The query rows."""
        return slice(self.begin, self.end)


def tiles(ranges: Ranges, tile: int = TILE, block: int = BLOCK) -> list[Tile]:
    """The work list of both passes; kept with the ranges."""
    if ("blocked", tile, block) not in ranges.plans:
        ranges.plans["blocked", tile, block] = list(_plan(ranges, tile, block))
    return ranges.plans["blocked", tile, block]


def computed_pairs(work: Sequence[Tile]) -> int:
    """Scores that the tiles compute, masked ones included."""
    return sum((tile.end - tile.begin) * (block.end - block.begin) for tile in work for block in tile.blocks)


def seen_pairs(work: Sequence[Tile]) -> int:
    """Scores that the tiles compute and do not mask."""
    edges = (edge for tile in work for block in tile.blocks for edge in block.edges)
    return computed_pairs(work) - sum(int(edge.bias_QJ.isinf().sum()) for edge in edges)


def blocked_attention(
    q_HTK: Tensor, text: KeyValue, summary: KeyValue, ranges: Ranges, tile: int = TILE, block: int = BLOCK
) -> tuple[Tensor, Tensor]:
    """Every query row attends to its ranges of text and summary rows, in one softmax.

    Keys and values are (G, N, K). Returns (H, T, K) in the dtype of `q_HTK`, and the log-sum-exp (H, T) of the scores,
    in fp32 at least and without gradient. Every row sees at least one text row.
    """
    inputs = (wide(q_HTK), *map(wide, text), *map(wide, summary))
    out_HTK, lse_HT = _Blocked.apply(*inputs, tiles(ranges, tile, block))
    return out_HTK.to(q_HTK.dtype), lse_HT


def _plan(ranges: Ranges, size: int, block: int) -> Iterator[Tile]:
    rows = len(ranges.text_begin_T)
    bounds = [bound_T.cpu() for bound_T in ranges.bounds]
    device, known = ranges.text_begin_T.device, dict[Any, tuple[Tensor, Tensor]]()
    for begin in range(0, rows, size):
        end = min(begin + size, rows)
        blocks: list[Block] = []
        for kind in (0, 1):
            begin_Q, end_Q = (bound_T[begin:end] for bound_T in bounds[2 * kind : 2 * kind + 2])
            lo, clear_lo, clear_hi, hi = int(begin_Q[0]), int(begin_Q[-1]), int(end_Q[0]), int(end_Q[-1])
            if clear_lo >= clear_hi:
                clear_lo = clear_hi = hi  # no key is seen by every row
            count = -(-(hi - lo) // block)
            for number in range(count):
                first, last = lo + (hi - lo) * number // count, lo + (hi - lo) * (number + 1) // count
                parts = ((first, min(clear_lo, last)), (max(clear_hi, first), last))
                edges = [_edge(begin_Q, end_Q, first, part, known, device) for part in parts if part[0] < part[1]]
                blocks.append(Block(kind, first, last, tuple(edges)))
        yield Tile(begin, end, tuple(blocks))


def _edge(
    begin_Q: Tensor, end_Q: Tensor, first: int, part: tuple[int, int], known: dict[Any, Any], device: torch.device
) -> Edge:
    """Most tiles have the same few masks, which are made once."""
    start, stop = part
    inside = [(bound_Q - start).clamp(0, stop - start) for bound_Q in (begin_Q, end_Q)]
    key = (stop - start, *(bound_Q.numpy().tobytes() for bound_Q in inside))
    if key not in known:
        column_J = torch.arange(stop - start)
        hidden_QJ = (column_J < inside[0][:, None]) | (column_J >= inside[1][:, None])
        bias_QJ = torch.zeros(hidden_QJ.shape).masked_fill_(hidden_QJ, -math.inf).to(device)
        known[key] = (bias_QJ, bias_QJ.T.contiguous())
    return Edge(slice(start - first, stop - first), *known[key])


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_HTK: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
        *keys_values, work = inputs
        groups, width = keys_values[0].shape[0], q_HTK.shape[-1]
        q_GFTK = q_HTK.unflatten(0, (groups, -1)) * (LOG2E / math.sqrt(width))
        out_GFTK, lse_GFT = torch.empty_like(q_GFTK), q_GFTK.new_empty(q_GFTK.shape[:3])
        scratch = _Scratch(q_GFTK, work, 1)
        bounded = _bound(q_GFTK, keys_values) <= SAFE_SCORE
        for tile in work:
            q_GXK = q_GFTK[:, :, tile.rows].flatten(1, 2)
            peak_GX1 = torch.zeros_like(q_GXK[..., :1]) if bounded else _peak(q_GXK, keys_values, tile, scratch)
            sum_GXK, total_GX1 = torch.zeros_like(q_GXK), torch.zeros_like(peak_GX1)
            for block in tile.blocks:
                score_GXJ = _scores(q_GXK, keys_values, tile, block, scratch)
                weight_GXJ = (score_GXJ if bounded else score_GXJ.sub_(peak_GX1)).exp2_()
                total_GX1 += weight_GXJ.sum(-1, keepdim=True)
                sum_GXK.baddbmm_(weight_GXJ, keys_values[2 * block.kind + 1][:, block.keys])
            shape = (groups, -1, tile.end - tile.begin)
            out_GFTK[:, :, tile.rows] = (sum_GXK / total_GX1).view(*shape, width)
            lse_GFT[:, :, tile.rows] = ((total_GX1.log2() + peak_GX1) / LOG2E).view(shape)
        out_HTK, lse_HT = out_GFTK.flatten(0, 1), lse_GFT.flatten(0, 1)
        ctx.save_for_backward(q_HTK, *keys_values, out_HTK, lse_HT)
        ctx.work = work
        ctx.mark_non_differentiable(lse_HT)
        return out_HTK, lse_HT

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q_HTK, *keys_values, out_HTK, lse_HT = ctx.saved_tensors
        groups, width = keys_values[0].shape[0], q_HTK.shape[-1]
        delta_HT1 = (gradients[0] * out_HTK).sum(-1, keepdim=True)
        q_HTE = torch.cat((q_HTK * (LOG2E / math.sqrt(width)), -LOG2E * lse_HT[..., None]), dim=-1)
        grad_HTE = torch.cat((gradients[0], -delta_HT1), dim=-1)
        q_GFTE, grad_GFTE = (x_HTE.unflatten(0, (groups, -1)) for x_HTE in (q_HTE, grad_HTE))
        ones = [torch.cat((x_GNK, x_GNK.new_ones(*x_GNK.shape[:2], 1)), dim=-1) for x_GNK in keys_values]
        dq_HTK, d_keys_values = torch.empty_like(q_HTK), [torch.zeros_like(x_GNK) for x_GNK in keys_values]
        dq_GFTK = dq_HTK.unflatten(0, (groups, -1))
        scratch = _Scratch(q_GFTE, ctx.work, 2)
        for tile in ctx.work:
            q_GXE, grad_GXE = (x_GFTE[:, :, tile.rows].flatten(1, 2) for x_GFTE in (q_GFTE, grad_GFTE))
            dq_GXK = q_GXE.new_zeros(*q_GXE.shape[:2], width)
            for block in tile.blocks:
                key_GJE, value_GJE = (of_kind[:, block.keys] for of_kind in ones[2 * block.kind : 2 * block.kind + 2])
                d_key_GNK, d_value_GNK = d_keys_values[2 * block.kind : 2 * block.kind + 2]
                weight_GJX = torch.bmm(key_GJE, q_GXE.transpose(1, 2), out=scratch.scores(0, key_GJE, q_GXE))
                for edge in block.edges:
                    of_heads = weight_GJX[:, edge.columns].unflatten(2, (-1, tile.end - tile.begin))
                    of_heads += edge.bias_JQ[:, None]
                weight_GJX.exp2_()
                d_value_GNK[:, block.keys] += torch.bmm(weight_GJX, grad_GXE[..., :width])
                d_score_GJX = torch.bmm(value_GJE, grad_GXE.transpose(1, 2), out=scratch.scores(1, key_GJE, q_GXE))
                d_score_GJX *= weight_GJX
                dq_GXK.baddbmm_(d_score_GJX.transpose(1, 2), key_GJE[..., :width])
                d_key_GNK[:, block.keys] += torch.bmm(d_score_GJX, q_GXE[..., :width])
            dq_GFTK[:, :, tile.rows] = dq_GXK.mul_(1 / math.sqrt(width)).unflatten(1, (-1, tile.end - tile.begin))
        for of_kind in (0, 2):
            d_keys_values[of_kind] /= LOG2E  # of natural scores
        return dq_HTK, *d_keys_values, None


class _Scratch:
    """Memory for the scores of one block, allocated once."""

    def __init__(self, q_GFTK: Tensor, work: Sequence[Tile], count: int) -> None:
        sizes = [(tile.end - tile.begin) * (block.end - block.begin) for tile in work for block in tile.blocks]
        self.flat = q_GFTK.new_empty(count, q_GFTK.shape[0] * q_GFTK.shape[1] * max(sizes, default=0))

    def scores(self, number: int, rows: Tensor, columns: Tensor) -> Tensor:
        """(G, rows, columns)."""
        shape = (rows.shape[0], rows.shape[1], columns.shape[1])
        return self.flat[number, : math.prod(shape)].view(shape)


def _scores(q_GXK: Tensor, keys_values: Sequence[Tensor], tile: Tile, block: Block, scratch: _Scratch) -> Tensor:
    """(G, X, J), -inf where a row does not see a key."""
    key_GJK = keys_values[2 * block.kind][:, block.keys]
    score_GXJ = torch.bmm(q_GXK, key_GJK.transpose(1, 2), out=scratch.scores(0, q_GXK, key_GJK))
    for edge in block.edges:
        of_heads = score_GXJ[..., edge.columns].unflatten(1, (-1, tile.end - tile.begin))
        of_heads += edge.bias_QJ
    return score_GXJ


def _bound(q_GFTK: Tensor, keys_values: Sequence[Tensor]) -> float:
    """No score is larger, by the norms of queries and keys."""
    norms = [x.norm(dim=-1).amax() if x.numel() else x.new_zeros(()) for x in (q_GFTK, *keys_values[::2])]
    return float(norms[0] * torch.maximum(norms[1], norms[2]))


def _peak(q_GXK: Tensor, keys_values: Sequence[Tensor], tile: Tile, scratch: _Scratch) -> Tensor:
    """(G, X, 1): the largest score of every row."""
    peak_GX1 = torch.full_like(q_GXK[..., :1], -math.inf)
    for block in tile.blocks:
        of_block = _scores(q_GXK, keys_values, tile, block, scratch).amax(-1, keepdim=True)
        peak_GX1 = torch.maximum(peak_GX1, of_block)
    return peak_GX1
