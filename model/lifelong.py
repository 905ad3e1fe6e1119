"""The lifelong pathway: a long history through a stack of summary attention, read by its last window and the summaries
of everything older.

Positions are rotary, within the stack: nothing is learned per place, so that a history may grow without end. New events
of a history that is kept cost only themselves.

Legend: B context rows, N events of a sequence, T events of all rows, C concatenated feature width, P context positions
of a row, D context width, U = B histories.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from onetrain.model.ksa.cache import History
from onetrain.model.ksa.decode import prefill, step
from onetrain.model.ksa.layout import Layout
from onetrain.model.ksa.stack import KSAStack
from onetrain.model.options import KSAOptions, ModelOptions
from onetrain.model.pathway import ALWAYS, NEVER, Positions, Project


class LifelongPathway(nn.Module):
    """Events to the states that the decoder reads: projection, stack, projection to the context's width, RMSNorm.

    Rows are packed, so that only real events cost anything; a hidden event counts as one that never was.
    """

    def __init__(self, options: ModelOptions, name: str, width: int) -> None:
        super().__init__()
        ksa = options.ksa[name]
        self.project = Project(width, ksa.width, options.pathway_projection == "mlp")
        self.stack = KSAStack(ksa, options.norm_eps)
        self.expand = nn.Linear(ksa.width, options.d_context, bias=False)
        self.norm = nn.RMSNorm(options.d_context, eps=options.norm_eps)
        self.dropout = nn.Dropout(options.dropout)

    def forward(self, x_BNC: Tensor, length_B: Tensor, index_BN: Tensor) -> Positions:
        """Event embeddings to (B, P, D); P is the most that a row of the batch is read as. Oldest first."""
        real_BN = index_BN != NEVER
        layout = self.stack.layout(real_BN.sum(1).tolist(), x_BNC.device)
        part = self.stack.sequence.part(layout)
        x_TC = self.dropout(x_BNC)[real_BN][part.text]
        rows_BP, real_BP = reading(layout, self.stack.options)
        states_XD = self.stack(self.project(x_TC), part, rows_BP.flatten())
        return self._positions(states_XD.unflatten(0, rows_BP.shape), real_BP)

    def _positions(self, state_BPD: Tensor, real_BP: Tensor) -> Positions:
        # every request lies behind the whole history, so that its targets see all of it
        return Positions(self.norm(self.expand(state_BPD)), torch.where(real_BP, ALWAYS, NEVER))

    @torch.no_grad()
    def start(self, x_BNC: Tensor, length_B: Tensor, index_BN: Tensor) -> tuple[Positions, History]:
        """What `forward` returns, and the histories, to which `append` adds. Evaluation mode."""
        self._check_mode()
        real_BN = index_BN != NEVER
        layout = self.stack.layout(real_BN.sum(1).tolist(), x_BNC.device)
        history = prefill(self.stack, self.project(x_BNC[real_BN]), layout)
        return self._read(history), history

    @torch.no_grad()
    def append(self, history: History, x_BNC: Tensor, new_length_B: Tensor) -> Positions:
        """`new_length_B` more events of every history, oldest first; what `forward` returns for all events so far.

        The history is changed, event by event: after an error, its `length_B` says how many of them it has.
        """
        self._check_mode()
        for place in range(int(new_length_B.max())):
            step(self.stack, history, self.project(x_BNC[:, place]), place < new_length_B)
        return self._read(history)

    def _read(self, history: History) -> Positions:
        is_summary_BP, number_BP, real_BP = places(history.length_B, self.stack.options)
        state_BPD = history.states(is_summary_BP, number_BP)
        return self._positions(state_BPD, real_BP.to(state_BPD.device))

    def _check_mode(self) -> None:
        if self.training:
            raise ValueError("a kept history is for inference, without dropout and hidden events; call eval() first")


def read_counts(length: int, options: KSAOptions) -> tuple[int, int]:
    """(events, summary tokens) of a history of `length` events that the decoder reads."""
    old = max((length - 1) // options.chunk - options.window, 0)  # chunks before the last window
    return length - old * options.chunk, old * options.summaries


class Reading(NamedTuple):
    """Which rows of a stack the decoder reads."""

    rows_BP: Tensor  # of [all text; all summaries] of the layout; 0 for padding
    real_BP: Tensor  # bool


class Places(NamedTuple):
    """What the decoder reads of every history, in order."""

    is_summary_BP: Tensor
    number_BP: Tensor  # of the history's summary rows, or the position of its text; 0 for padding
    real_BP: Tensor


def places(length_B: Tensor, options: KSAOptions) -> Places:
    """Of every history the summaries of the chunks before its last window, then the text from there on.

    The same chunks that the next event would see (KSA, section 2.4), so that each is read once, in one of two forms.
    """
    old_B1 = ((length_B[:, None] - 1) // options.chunk - options.window).clamp_min(0)
    summaries_B1 = old_B1 * options.summaries
    count_B1 = summaries_B1 + length_B[:, None] - old_B1 * options.chunk
    place_P = torch.arange(int(count_B1.max()) if len(count_B1) else 0)
    is_summary_BP, real_BP = place_P < summaries_B1, place_P < count_B1
    number_BP = torch.where(is_summary_BP, place_P, place_P - summaries_B1 + old_B1 * options.chunk)
    return Places(is_summary_BP, torch.where(real_BP, number_BP, 0), real_BP)


def reading(layout: Layout, options: KSAOptions) -> Reading:
    """Where the rows that the decoder reads lie in packed histories."""
    is_summary_UP, number_UP, real_UP = places(layout.length_U, options)
    first_summary_U1 = layout.n_text + layout.summary_start_U[:, None]
    rows_UP = number_UP + torch.where(is_summary_UP, first_summary_U1, layout.text_start_U[:, None])
    return Reading(torch.where(real_UP, rows_UP, 0).to(layout.device), real_UP.to(layout.device))
