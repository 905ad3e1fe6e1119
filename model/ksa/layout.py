"""Where the tokens of packed histories lie, and what each of them may see (KSA, sections 2.1, 2.2 and 2.4).

Histories lie one behind the other: all text rows, and apart from them all summary rows. Chunk, position and window
begin anew with every history, and a last partial chunk has no summary. A text row sees one range of text rows and one
range of summary rows, whatever the window; every kernel works from these ranges alone.

Legend: T text rows of all histories, R summary rows, C chunk, S summaries per chunk, Z complete chunks (R = Z * S).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

Window = int | Literal["full"]  # previous chunks that are read as text, besides the own one


@dataclass(frozen=True, eq=False)
class Ranges:
    """Of every text row the text rows and the summary rows that it sees, [begin, end) each; none of them decreases."""

    text_begin_T: Tensor
    text_end_T: Tensor
    summary_begin_T: Tensor
    summary_end_T: Tensor
    plans: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)  # what kernels make of them, once

    @property
    def bounds(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Text begin and end, summary begin and end."""
        return self.text_begin_T, self.text_end_T, self.summary_begin_T, self.summary_end_T

    def rows(self, begin: int, end: int) -> "Ranges":
        """Those of the text rows [begin, end)."""
        return Ranges(*(bound_T[begin:end] for bound_T in self.bounds))


@dataclass(frozen=True)
class Layout:
    """Histories of these lengths, each in chunks of `chunk` tokens with `summaries` summary tokens behind them."""

    lengths: tuple[int, ...]
    chunk: int
    summaries: int
    device: torch.device

    @classmethod
    def of(cls, lengths: Sequence[int], chunk: int, summaries: int, device: torch.device | str = "cpu") -> "Layout":
        """Lengths in tokens; a history may be empty."""
        return cls(tuple(lengths), chunk, summaries, torch.device(device))

    @cached_property
    def length_U(self) -> Tensor:  # noqa: N802
        """Tokens of each history, on the CPU."""
        return torch.tensor(self.lengths, dtype=torch.int64)

    @cached_property
    def n_text(self) -> int:
        """T."""
        return sum(self.lengths)

    @cached_property
    def n_summaries(self) -> int:
        """R."""
        return self.summaries * sum(length // self.chunk for length in self.lengths)

    @cached_property
    def text_start_U(self) -> Tensor:  # noqa: N802
        """First text row of each history, on the CPU."""
        return self.length_U.cumsum(0) - self.length_U

    @cached_property
    def summary_start_U(self) -> Tensor:  # noqa: N802
        """First summary row of each history, on the CPU."""
        rows_U = self.length_U // self.chunk * self.summaries
        return rows_U.cumsum(0) - rows_U

    @cached_property
    def position_T(self) -> Tensor:  # noqa: N802
        """Position of every text row within its history."""
        rows_T = torch.arange(self.n_text) - self.text_start_U.repeat_interleave(self.length_U)
        return rows_T.to(self.device)

    @cached_property
    def position_R(self) -> Tensor:  # noqa: N802
        """Position of every summary row: slot j of chunk i stands at i * C + floor((j + 1) * C / S) - 1."""
        if self.n_summaries == 0:
            return torch.empty(0, dtype=torch.int64, device=self.device)
        offset_S = summary_offsets(self.chunk, self.summaries).to(self.device)
        return (self.position_T[self.chunk_text_ZC[:, :1]] + offset_S).flatten()

    @cached_property
    def chunk_text_ZC(self) -> Tensor:  # noqa: N802
        """The text rows of every complete chunk."""
        chunks_U = self.length_U // self.chunk
        first_U = chunks_U.cumsum(0) - chunks_U
        within_Z = torch.arange(int(chunks_U.sum())) - first_U.repeat_interleave(chunks_U)
        first_Z = self.text_start_U.repeat_interleave(chunks_U) + within_Z * self.chunk
        return (first_Z[:, None] + torch.arange(self.chunk)).to(self.device)

    def ranges(self, window: Window) -> Ranges:
        """What text rows see with a window of so many previous chunks; `full` is plain causal attention over text.

        The summaries of a chunk are seen from the moment that its text has left the window: of every earlier chunk a
        row sees all the text or all the summaries. Found once for all layers of a kind.
        """
        if window not in self._ranges:
            self._ranges[window] = self._find_ranges(window)
        return self._ranges[window]

    @cached_property
    def _ranges(self) -> dict[Window, Ranges]:
        return {}

    def _find_ranges(self, window: Window) -> Ranges:
        start_T = self.text_start_U.repeat_interleave(self.length_U).to(self.device)
        summary_T = self.summary_start_U.repeat_interleave(self.length_U).to(self.device)
        after_T = start_T + self.position_T + 1
        if window == "full":
            return Ranges(start_T, after_T, torch.zeros_like(after_T), torch.zeros_like(after_T))
        oldest_T = (self.position_T // self.chunk - window).clamp_min(0)  # chunk that is still read as text
        return Ranges(start_T + oldest_T * self.chunk, after_T, summary_T, summary_T + oldest_T * self.summaries)


def summary_offsets(chunk: int, summaries: int) -> Tensor:
    """(S,) places of a chunk's summary tokens, counted from its first text token; with one, that of the last."""
    return ((torch.arange(summaries) + 1) * chunk // max(summaries, 1) - 1).clamp_min(0)


def score_pairs(length: int, chunk: int, summaries: int, window: Window) -> int:
    """Query-key pairs of one head over one history, in closed form (KSA, section 4): local, summary and own."""
    whole, rest = divmod(length, chunk)
    own = whole * (summaries * chunk + summaries * (summaries + 1) // 2)
    if window == "full":
        return length * (length + 1) // 2 + own
    full = max(whole - window, 0)  # chunks whose window has filled
    ramp = whole - full
    local = chunk * chunk * (ramp * (ramp - 1) // 2 + full * window) + whole * chunk * (chunk + 1) // 2
    local += rest * chunk * min(whole, window) + rest * (rest + 1) // 2
    old = chunk * summaries * (full * (full - 1) // 2) + rest * summaries * full
    return local + old + own
