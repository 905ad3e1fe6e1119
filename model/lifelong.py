"""The lifelong pathway: a long history through a stack of summary attention, read by its last window and the summaries
of everything older.

Positions are rotary, within the stack: nothing is learned per place, so that a history may grow without end.

Legend: B context rows, N events of a sequence, T events of all rows, C concatenated feature width, P context positions
of a row, D context width, U = B histories.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

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
        x_BPD = self.norm(self.expand(states_XD)).unflatten(0, rows_BP.shape)
        # every request lies behind the whole history, so that its targets see all of it
        return Positions(x_BPD, torch.where(real_BP, ALWAYS, NEVER))


def read_counts(length: int, options: KSAOptions) -> tuple[int, int]:
    """(events, summary tokens) of a history of `length` events that the decoder reads."""
    old = max((length - 1) // options.chunk - options.window, 0)  # chunks before the last window
    return length - old * options.chunk, old * options.summaries


class Reading(NamedTuple):
    """Which rows of a stack the decoder reads."""

    rows_BP: Tensor  # of [all text; all summaries] of the layout; 0 for padding
    real_BP: Tensor  # bool


def reading(layout: Layout, options: KSAOptions) -> Reading:
    """Of every history the summaries of the chunks before its last window, then the text from there on.

    The same chunks that the next event would see (KSA, section 2.4), so that each is read once, in one of two forms.
    """
    old_U = ((layout.length_U - 1) // options.chunk - options.window).clamp_min(0)
    summaries_U = old_U * options.summaries
    text_U = layout.length_U - old_U * options.chunk
    place_P = torch.arange(int((summaries_U + text_U).max())) if len(layout.lengths) else torch.arange(0)
    is_summary_UP = place_P < summaries_U[:, None]
    summary_UP = layout.n_text + layout.summary_start_U[:, None] + place_P
    first_U = layout.text_start_U + old_U * options.chunk
    text_UP = first_U[:, None] + place_P - summaries_U[:, None]
    real_UP = place_P < (summaries_U + text_U)[:, None]
    rows_UP = torch.where(real_UP, torch.where(is_summary_UP, summary_UP, text_UP), 0)
    return Reading(rows_UP.to(layout.device), real_UP.to(layout.device))
