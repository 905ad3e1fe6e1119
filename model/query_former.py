"""Query-Former: learned queries that compress a sequence to a few positions (OneMall, section 3.1; OneRec-V1, QFormer).

Legend: B rows, N positions of the sequence, M queries, W width of the Query-Former.
"""

import torch
from torch import Tensor, nn

from onetrain.model.attention import KeyValue, attend, split_heads
from onetrain.model.ffn import SwiGLU
from onetrain.model.options import QueryFormerOptions


class QueryFormerBlock(nn.Module):
    """Pre-norm cross-attention to the sequence, then FFN, each with a residual (assumption)."""

    def __init__(self, options: QueryFormerOptions, norm_eps: float) -> None:
        super().__init__()
        width = options.width
        self.heads = options.heads
        self.cross_norm = nn.RMSNorm(width, eps=norm_eps)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.ffn_norm = nn.RMSNorm(width, eps=norm_eps)
        self.ffn = SwiGLU(width, options.ffn_width)

    def forward(self, f_BMW: Tensor, x_BNW: Tensor, seen_BN: Tensor) -> Tensor:
        """Returns the new states of the queries, (B, M, W)."""
        query = split_heads(self.query(self.cross_norm(f_BMW)), self.heads)
        kv = KeyValue(split_heads(self.key(x_BNW), self.heads), split_heads(self.value(x_BNW), self.heads))
        some_B = seen_BN.any(1)[:, None, None]
        mask_B1N = seen_BN[:, None] | ~some_B  # a row without events attends to padding, and drops the result
        y_BMW = self.out(attend(query, kv, mask_B1N[:, None]).transpose(1, 2).flatten(2))
        f_BMW = f_BMW + torch.where(some_B, y_BMW, 0.0)
        return f_BMW + self.ffn(self.ffn_norm(f_BMW))


class QueryFormer(nn.Module):
    """F = QFormer(Q, H, H): M learned queries read N positions."""

    def __init__(self, options: QueryFormerOptions, norm_eps: float) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.empty(options.queries, options.width))
        self.norm = nn.RMSNorm(options.width, eps=norm_eps)
        self.blocks = nn.ModuleList(QueryFormerBlock(options, norm_eps) for _ in range(options.blocks))

    def forward(self, x_BNW: Tensor, seen_BN: Tensor) -> Tensor:
        """Read the positions where `seen_BN` is true, which may be none. Returns (B, M, W)."""
        x_BNW = self.norm(x_BNW)
        f_BMW = self.queries.expand(x_BNW.shape[0], -1, -1)
        for block in self.blocks:
            f_BMW = block(f_BMW, x_BNW, seen_BN)
        return f_BMW
