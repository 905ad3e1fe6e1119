"""What a stack of summary attention keeps of histories that go on (KSA, section 5.1): keys and values of every layer,
and the states behind the last one.

Text token t of a history lies in slot t mod `ring`, its summary row r in slot ring + r. Nothing is moved or cleared
when a chunk leaves the window: which slots a token sees follows from its position alone. So what lies beyond the length
of a history does not exist, and one assignment of the lengths makes it exist.

Legend: B histories, N slots, X rows written, Z chunks, P rows read, C chunk, S summaries per chunk, H heads,
G KV groups, F = H / G, K head width, D width.
"""

import math

import torch
from torch import Tensor

from onetrain.model.attention import KeyValue
from onetrain.model.ksa.layout import Layout
from onetrain.model.options import KSAOptions
from onetrain.model.precision import wide


def grown(x: Tensor, slots: int) -> Tensor:
    """`x` (..., N, K) with room for `slots`; if it must grow, then by a quarter at least, so that it is rarely copied.

    New slots are zero: what nobody sees still meets a weight of zero, so it must be finite.
    """
    had = x.shape[-2]
    if slots <= had:
        return x
    room = x.new_zeros(*x.shape[:-2], max(slots, had + had // 4 + 16), x.shape[-1])
    room[..., :had, :] = x
    return room


class LayerCache:
    """Keys, after rotation, and values of one layer, (B, G, N, K).

    A KSA layer has W * C + C slots of text and S for every complete chunk; a full layer one for every text token, and
    none for summaries, which nobody reads there once their own step is over.
    """

    def __init__(self, options: KSAOptions, full: bool, rows: int, like: Tensor) -> None:
        self.options, self.full = options, full
        self.ring = 0 if full else (options.window + 1) * options.chunk
        self.key_BGNK = like.new_zeros(rows, options.groups, self.ring, options.d_head)
        self.value_BGNK = torch.zeros_like(self.key_BGNK)

    def rows(self, length: Tensor) -> Tensor:
        """Slots that histories of these lengths fill."""
        if self.full:
            return length
        return length.clamp_max(self.ring) + length // self.options.chunk * self.options.summaries

    def text_slot(self, position: Tensor) -> Tensor:
        """Of text tokens at these positions."""
        return position if self.full else position % self.ring

    def write(self, row_X: Tensor, slot_X: Tensor, kv: KeyValue) -> None:
        """Keys and values (G, X, K) into slots of histories."""
        if not len(slot_X):
            return
        slots = int(slot_X.max()) + 1
        self.key_BGNK, self.value_BGNK = grown(self.key_BGNK, slots), grown(self.value_BGNK, slots)
        for cache, new in zip((self.key_BGNK, self.value_BGNK), kv, strict=True):
            cache[row_X, :, slot_X] = new.transpose(0, 1).to(cache.dtype)

    def write_text(self, row_X: Tensor, position_X: Tensor, kv: KeyValue) -> None:
        """Of text tokens at these positions."""
        self.write(row_X, self.text_slot(position_X), kv)

    def write_summaries(self, row_X: Tensor, number_X: Tensor, kv: KeyValue) -> None:
        """Of summary rows of these numbers."""
        if not self.full:
            self.write(row_X, self.ring + number_X, kv)

    def chunk_text(self, row_Z: Tensor, first_Z: Tensor) -> KeyValue:
        """Keys and values (G, Z * C, K) of the chunks that begin at these positions."""
        slot_ZC = self.text_slot(first_Z[:, None] + torch.arange(self.options.chunk, device=first_Z.device))
        kept = (cache[row_Z[:, None], :, slot_ZC] for cache in (self.key_BGNK, self.value_BGNK))
        return KeyValue(*(of_chunk_ZCGK.flatten(0, 1).transpose(0, 1) for of_chunk_ZCGK in kept))

    def seen(self, position_B: Tensor) -> Tensor:
        """(B, N) bool: the slots that text tokens at these positions see (section 2.4); N ends with the last of any."""
        last, device = int(position_B.max()), position_B.device
        if self.full:
            return torch.arange(last + 1, device=device) <= position_B[:, None]
        chunk, window = self.options.chunk, self.options.window
        slot_N = torch.arange(min(last + 1, self.ring), device=device)
        token_BN = position_B[:, None] - (position_B[:, None] - slot_N) % self.ring  # the newest that has this slot
        old_B1 = (position_B[:, None] // chunk - window).clamp_min(0)  # chunks that are read as summaries
        number_R = torch.arange(max(last // chunk - window, 0) * self.options.summaries, device=device)
        return torch.cat((token_BN >= old_B1 * chunk, number_R < old_B1 * self.options.summaries), dim=1)

    def attend(self, q_HBK: Tensor, seen_BN: Tensor) -> Tensor:
        """One text token of every history attends to the slots that it sees; (H, B, K)."""
        key_BGNK, value_BGNK = (wide(cache[:, :, : seen_BN.shape[1]]) for cache in (self.key_BGNK, self.value_BGNK))
        q_BGFK = wide(q_HBK).unflatten(0, (self.options.groups, -1)).permute(2, 0, 1, 3)
        score_BGFN = q_BGFK @ key_BGNK.transpose(-1, -2) / math.sqrt(q_HBK.shape[-1])
        weight_BGFN = score_BGFN.masked_fill(~seen_BN[:, None, None], -math.inf).softmax(-1)
        return (weight_BGFN @ value_BGNK).flatten(1, 2).transpose(0, 1).to(q_HBK.dtype)


class History:
    """The cache of a stack for B histories, each with a length and a phase of its own.

    `length_B` (on the CPU) says what exists of all layers and of the states. Of the text, the states of the last
    (W + 1) * C tokens are kept, which is what a reader of the last window may want, and those of all summaries.
    """

    def __init__(self, options: KSAOptions, rows: int, like: Tensor) -> None:
        self.options = options
        self.length_B = torch.zeros(rows, dtype=torch.int64)
        self.layers = [LayerCache(options, kind == "full", rows, like) for kind in options.layers]
        # one slot more than is read: the next token's state is not yet to be seen when it is written
        self.ring = (options.window + 1) * options.chunk + 1
        self.state_BND = like.new_zeros(rows, self.ring, options.width)

    @property
    def rows(self) -> list[Tensor]:
        """Slots of every layer that each history fills, (B,) each."""
        return [layer.rows(self.length_B) for layer in self.layers]

    def write_states(self, row_X: Tensor, slot_X: Tensor, state_XD: Tensor) -> None:
        """States of text or summaries into slots."""
        if len(slot_X):
            self.state_BND = grown(self.state_BND, int(slot_X.max()) + 1)
            self.state_BND[row_X, slot_X] = state_XD.to(self.state_BND.dtype)

    def states(self, is_summary_BP: Tensor, number_BP: Tensor) -> Tensor:
        """(B, P, D): states of summary rows of these numbers, and of text at these positions."""
        slot_BP = torch.where(is_summary_BP, self.ring + number_BP, number_BP % self.ring).to(self.state_BND.device)
        rows = torch.arange(len(self.length_B), device=slot_BP.device)
        return self.state_BND[rows[:, None], slot_BP]

    def keep(self, x_AD: Tensor, layout: Layout) -> None:
        """The states of whole histories, rows [text; summaries] of `layout`, as far as anybody will read them."""
        row_T, row_R, number_R = history_rows(layout)
        kept_T = layout.position_T >= layout.length_U.to(layout.device)[row_T] - self.ring
        self.write_states(row_T[kept_T], layout.position_T[kept_T] % self.ring, x_AD[: layout.n_text][kept_T])
        self.write_states(row_R, self.ring + number_R, x_AD[layout.n_text :])


def history_rows(layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Of every text row its history; of every summary row its history and its number in it."""
    number_U = torch.arange(len(layout.lengths))
    rows_U = layout.length_U // layout.chunk * layout.summaries
    row_T, row_R = number_U.repeat_interleave(layout.length_U), number_U.repeat_interleave(rows_U)
    number_R = torch.arange(layout.n_summaries) - layout.summary_start_U[row_R]
    return row_T.to(layout.device), row_R.to(layout.device), number_R.to(layout.device)
