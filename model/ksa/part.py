"""The part of a layout that one process computes, and what it takes from the rest: here, all and nothing.

Context parallelism puts its own `Sequence` in the place of this one; the stack does not know.

Legend: T text rows of the part, R its summary rows, A = T + R, Z its complete chunks, C chunk, H heads, G KV groups,
K head width, D width, P rows asked for, U histories.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from onetrain.model.attention import KeyValue
from onetrain.model.ksa.kernels import attention
from onetrain.model.ksa.layout import Layout, Ranges, Window


@dataclass(frozen=True)
class Part:
    """Text rows [text_begin, text_end) of a layout, and the summaries of the chunks that are complete in them."""

    layout: Layout
    text_begin: int
    text_end: int
    summary_begin: int
    summary_end: int

    @property
    def text(self) -> slice:
        """Of the layout's text rows."""
        return slice(self.text_begin, self.text_end)

    @property
    def n_text(self) -> int:
        """T."""
        return self.text_end - self.text_begin

    @property
    def n_summaries(self) -> int:
        """R."""
        return self.summary_end - self.summary_begin

    @property
    def position_T(self) -> Tensor:  # noqa: N802
        """Positions of the text rows in their histories."""
        return self.layout.position_T[self.text]

    @property
    def position_R(self) -> Tensor:  # noqa: N802
        """Positions of the summary rows."""
        return self.layout.position_R[self.summary_begin : self.summary_end]

    @property
    def chunk_text_ZC(self) -> Tensor:  # noqa: N802
        """Text rows, counted within the part, of every chunk that has summaries; (0, C) without summaries."""
        per_chunk = max(self.layout.summaries, 1)
        chunks = slice(self.summary_begin // per_chunk, self.summary_end // per_chunk)
        return self.layout.chunk_text_ZC[chunks] - self.text_begin

    def ranges(self, window: Window) -> Ranges:
        """What the text rows see, in row numbers of the whole layout."""
        ranges = self.layout.ranges(window)
        return ranges if self.n_text == self.layout.n_text else ranges.rows(self.text_begin, self.text_end)


class Sequence(nn.Module):
    """Histories that lie in this process, all of them."""

    def part(self, layout: Layout) -> Part:
        """The rows that this process computes."""
        return Part(layout, 0, layout.n_text, 0, layout.n_summaries)

    def attend(
        self, q_HTK: Tensor, text: KeyValue, summary: KeyValue, part: Part, window: Window, kernel: str
    ) -> Tensor:
        """Text rows of the part attend to what they see; keys and values are those of the part, (G, T or R, K)."""
        return attention(q_HTK, text, summary, part.ranges(window), kernel)

    def states(self, x_AD: Tensor, part: Part, rows_P: Tensor) -> Tensor:
        """(P, D): rows of [all text; all summaries] of the layout, given those of the part."""
        return x_AD[rows_P]

    def history_sums(self, value_T: Tensor, part: Part) -> Tensor:
        """(U,) of every history the sum over its text rows, given the values of those of the part."""
        length_U = part.layout.length_U.to(value_T.device)
        number_U = torch.arange(len(length_U), device=value_T.device)
        history_T = number_U.repeat_interleave(length_U, output_size=part.layout.n_text)[part.text]
        return value_T.new_zeros(len(length_U)).index_add(0, history_T, value_T)
