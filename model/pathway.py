"""One behaviour sequence to context positions (OneRec-V2, figure 4; OneMall's Query-Formers).

Legend: B context rows, N events of a sequence, M queries of a Query-Former, P context positions, C concatenated feature
width, D context width.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onetrain.model.options import ModelOptions
from onetrain.model.query_former import QueryFormer

ALWAYS = torch.iinfo(torch.int64).min  # index of a position that every target sees
NEVER = torch.iinfo(torch.int64).max  # of padding


class Positions(NamedTuple):
    """Context positions; a target of `end` e sees those whose index is below e."""

    x_BPD: Tensor
    index_BP: Tensor  # int64


class Project(nn.Module):
    """The linear of a pathway (OneRec-V2, figure 4), or Dense-LeakyReLU-Dense (OneRec-V1, section 2.6)."""

    def __init__(self, width: int, out: int, mlp: bool) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, out, bias=False) if mlp else None
        self.out = nn.Linear(out if mlp else width, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to (..., out)."""
        return self.out(x if self.hidden is None else F.leaky_relu(self.hidden(x)))


class Pathway(nn.Module):
    """One behaviour sequence: learned positions, projection, RMSNorm; with a Query-Former, queries instead of events.

    Positions are learned per pathway (assumption of the specification): counted from the oldest event of the sequence
    (`absolute`) or back from the newest (`recency`).
    """

    def __init__(self, options: ModelOptions, name: str, length: int, width: int) -> None:
        super().__init__()
        self.recency = options.position == "recency"
        self.position = nn.Embedding(length, width) if options.position != "none" else None
        former = options.query_formers.get(name)
        mlp = options.pathway_projection == "mlp"
        self.project = Project(width, options.d_context if former is None else former.width, mlp)
        self.query_former = None if former is None else QueryFormer(former, options.norm_eps)
        self.expand = None if former is None else nn.Linear(former.width, options.d_context, bias=False)
        self.norm = nn.RMSNorm(options.d_context, eps=options.norm_eps)
        self.dropout = nn.Dropout(options.dropout)

    def forward(self, x_BNC: Tensor, length_B: Tensor, index_BN: Tensor) -> Positions:
        """Event embeddings to context positions: (B, N, D), or (B, M, D) through a Query-Former."""
        if self.position is not None:
            place = torch.arange(x_BNC.shape[1], device=x_BNC.device)[None]
            x_BNC = x_BNC + self.position((length_B[:, None] - 1 - place).clamp_min(0) if self.recency else place)
        x_BND = self.project(self.dropout(x_BNC))
        if self.query_former is not None and self.expand is not None:
            x_BND = self.expand(self.query_former(x_BND, index_BN != NEVER))
            index_BN = index_BN.new_full(x_BND.shape[:2], ALWAYS)
        return Positions(self.norm(x_BND), index_BN)
