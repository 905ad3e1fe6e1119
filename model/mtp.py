"""Sequential multi-token prediction (OneLive, section 3.5): lite modules predict later levels from earlier states.

Module k (from 1) turns the states of module k-1 (module 0 is the main stack) and the next codes into states that
predict levels k..L-1. Its attention is the main stack's first block, so it reads that block's key/value cache; its own
are the fusion, the norms and the FFN. Embeddings and heads are the main stack's.

Legend: M targets, S tokens, D width, L SID levels.
"""

import torch
from torch import Tensor, nn

from onetrain.model.attention import KeyValue
from onetrain.model.block import Block
from onetrain.model.decoder import TargetLayout
from onetrain.model.ffn import SwiGLU
from onetrain.model.options import ModelOptions


class LiteModule(nn.Module):
    """MTP_k. RMSNorm on both halves before a linear fusion, as DeepSeek-V3 (assumption)."""

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        d, eps = options.d_model, options.norm_eps
        self.state_norm = nn.RMSNorm(d, eps=eps)
        self.code_norm = nn.RMSNorm(d, eps=eps)
        self.fuse = nn.Linear(2 * d, d, bias=False)
        self.ffn_norm = nn.RMSNorm(d, eps=eps)
        self.ffn = SwiGLU(d, options.ffn_width)
        self.dropout = nn.Dropout(options.dropout)

    def forward(
        self,
        state_MSD: Tensor,
        code_MSD: Tensor,
        first: Block,
        kv: KeyValue,
        mask_BTP: Tensor,
        layout: TargetLayout,
        bos: KeyValue | None,
    ) -> Tensor:
        """States of the module before, fused with the embedded codes that follow them, to this module's states.

        `first` is the main stack's first block and `kv` its context; `bos` holds its self-attention keys of BOS, or
        None. Returns (M, S, D).
        """
        h_MSD = self.fuse(torch.cat((self.state_norm(state_MSD), self.code_norm(code_MSD)), dim=-1))  # Eq. 19
        h_MSD, _ = first.attend(h_MSD, kv, mask_BTP, layout, bos)
        return h_MSD + self.dropout(self.ffn(self.ffn_norm(h_MSD)))
