"""The same attention by FlexAttention, for GPUs: one compiled kernel with a list of key blocks made by hand.

Summary keys lie before the text keys, in one buffer, so that whole blocks of either can be left out. The list tells
blocks that every row sees from those that need the mask, and names none twice.

Legend: T query rows, N = R + T keys (summaries, then text), H query heads, G KV groups, K head width, I query blocks,
J key blocks.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask
from torch.nn.attention.flex_attention import flex_attention as torch_flex_attention

from onetrain.model.attention import KeyValue
from onetrain.model.ksa.layout import Ranges

SIZE = 128  # rows and keys of a block


def flex_attention(q_HTK: Tensor, text: KeyValue, summary: KeyValue, ranges: Ranges) -> tuple[Tensor, Tensor]:
    """Every query row attends to its ranges of text and summary rows, in one softmax.

    Keys and values are (G, N, K). Returns (H, T, K) and the log-sum-exp (H, T).
    """
    key, value = (torch.cat(pair, dim=1)[None] for pair in zip(summary, text, strict=True))
    run = _compiled() if q_HTK.is_cuda else torch_flex_attention
    mask = block_mask(ranges, summary.key_BGNK.shape[1], text.key_BGNK.shape[1])
    grouped = q_HTK.shape[0] != key.shape[1]
    aux = AuxRequest(lse=True)
    out_HTK, extra = run(q_HTK[None], key, value, block_mask=mask, enable_gqa=grouped, return_aux=aux)
    return out_HTK[0], extra.lse[0]


def block_mask(ranges: Ranges, summaries: int, texts: int, size: int = SIZE) -> BlockMask:
    """The key blocks of every query block, without a matrix of all pairs; kept with the ranges."""
    if ("flex", summaries, size) not in ranges.plans:
        ranges.plans["flex", summaries, size] = _plan(ranges, summaries, texts, size)
    return ranges.plans["flex", summaries, size]


def _plan(ranges: Ranges, summaries: int, texts: int, size: int) -> BlockMask:
    text_begin_T, text_end_T, summary_begin_T, summary_end_T = ranges.bounds

    def seen(_batch: Tensor, _head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        place = key - summaries  # of a text key; compared, never divided, where it is negative
        of_text = (place >= text_begin_T[row]) & (place < text_end_T[row])
        of_summary = (key >= summary_begin_T[row]) & (key < summary_end_T[row])
        return torch.where(key >= summaries, of_text, of_summary)

    some_IJ, all_IJ = _blocks(ranges, summaries, texts, size)
    part, whole = _listed(some_IJ & ~all_IJ), _listed(all_IJ)
    return BlockMask.from_kv_blocks(
        *part, *whole, (size, size), seen, seq_lengths=(len(text_begin_T), summaries + texts)
    )


def seen_pairs(mask: BlockMask, rows: int, keys: int) -> int:
    """Pairs that the listed blocks compute and do not mask."""
    size, seen = mask.BLOCK_SIZE[0], mask.mask_mod
    zero, total = torch.tensor(0), 0
    for numbers, indices, whole in (
        (mask.kv_num_blocks, mask.kv_indices, False),
        (mask.full_kv_num_blocks, mask.full_kv_indices, True),
    ):
        assert numbers is not None
        assert indices is not None
        for block, number in enumerate(numbers[0, 0].tolist()):
            row_Q = torch.arange(block * size, min((block + 1) * size, rows))
            for other in indices[0, 0, block, :number].tolist():
                key_J = torch.arange(other * size, min((other + 1) * size, keys))
                total += len(row_Q) * len(key_J) if whole else int(seen(zero, zero, row_Q[:, None], key_J).sum())
    return total


def _blocks(ranges: Ranges, summaries: int, texts: int, size: int) -> tuple[Tensor, Tensor]:
    """(I, J) bool each: key blocks of which some row sees a key, and those of which every row sees every key."""
    rows, keys = len(ranges.text_begin_T), summaries + texts
    first_I = torch.arange(0, rows, size, device=ranges.text_begin_T.device)
    last_I = (first_I + size).clamp_max(rows) - 1
    begin_J = torch.arange(0, keys, size, device=first_I.device)
    end_J = (begin_J + size).clamp_max(keys)
    text, summary = [b_T + summaries for b_T in ranges.bounds[:2]], list(ranges.bounds[2:])
    some_IJ = torch.zeros(len(first_I), len(begin_J), dtype=torch.bool, device=first_I.device)
    clear = []
    for begin_T, end_T in (summary, text):  # ranges never decrease, so that the first and last row bound a block's
        begin_I1, end_I1 = begin_T[first_I][:, None], end_T[last_I][:, None]
        some_IJ |= (torch.maximum(begin_I1, begin_J) < torch.minimum(end_I1, end_J)) & (begin_I1 < end_I1)
        clear.append((begin_T[last_I][:, None], end_T[first_I][:, None]))
    (summary_lo, summary_hi), (text_lo, text_hi) = clear
    left_J, right_J = begin_J < summaries, end_J > summaries  # the kinds of keys in a block; one block may have both
    in_summary = (summary_lo <= begin_J) & (end_J.clamp_max(summaries) <= summary_hi)
    in_text = (text_lo <= begin_J.clamp_min(summaries)) & (end_J <= text_hi)
    return some_IJ, (~left_J | in_summary) & (~right_J | in_text)


def _listed(chosen_IJ: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each query block has, and which, the chosen ones first."""
    order_IJ = torch.argsort(chosen_IJ.to(torch.int8), dim=1, descending=True, stable=True)
    return chosen_IJ.sum(1).to(torch.int32)[None, None], order_IJ.to(torch.int32)[None, None]


@cache
def _compiled() -> Any:
    """One compilation for all lengths."""
    return torch.compile(torch_flex_attention, dynamic=True)
