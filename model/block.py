"""Blocks: of the decoder (cross, self, FFN) and of the encoder and the decoder-only reference (self, FFN).

Legend: M targets, S tokens per target, B context rows, Q query tokens per row, P context positions, D width.
"""

from torch import Tensor, nn

from onetrain.model.attention import CrossAttention, KeyValue, SelfAttention
from onetrain.model.decoder import TargetLayout
from onetrain.model.ffn import SwiGLU
from onetrain.model.moe import SparseFFN
from onetrain.model.options import ModelOptions


class Block(nn.Module):
    """Pre-norm cross-attention, causal self-attention and FFN, each with a residual (OneRec-V2, section 2.3).

    The FFN is dense or, where `model.moe` says so, sparse.
    """

    def __init__(self, options: ModelOptions, sparse: bool = False) -> None:
        super().__init__()
        d, eps = options.d_model, options.norm_eps
        self.cross_norm = nn.RMSNorm(d, eps=eps)
        self.cross = CrossAttention(options)
        self.self_norm = nn.RMSNorm(d, eps=eps)
        self.self_attention = SelfAttention(options)
        self.ffn_norm = nn.RMSNorm(d, eps=eps)
        self.ffn = SparseFFN(options) if sparse else SwiGLU(d, options.ffn_width)
        self.dropout = nn.Dropout(options.dropout)

    def forward(
        self, h_MSD: Tensor, kv: KeyValue, mask_BTP: Tensor, layout: TargetLayout, past: KeyValue | None = None
    ) -> tuple[Tensor, KeyValue]:
        """Returns the new hidden states (M, S, D) and the self-attention keys and values so far."""
        h_MSD, present = self.attend(h_MSD, kv, mask_BTP, layout, past)
        return h_MSD + self.dropout(self.ffn(self.ffn_norm(h_MSD))), present

    def attend(
        self, h_MSD: Tensor, kv: KeyValue, mask_BTP: Tensor, layout: TargetLayout, past: KeyValue | None
    ) -> tuple[Tensor, KeyValue]:
        """The block without its FFN; every token of a target sees the context where `mask_BTP` is true."""
        mask_BQP = mask_BTP.repeat_interleave(h_MSD.shape[1], dim=1)
        cross_BQD = self.cross(layout.to_rows(self.cross_norm(h_MSD)), kv, mask_BQP)
        h_MSD = h_MSD + self.dropout(layout.from_rows(cross_BQD))
        self_MSD, present = self.self_attention(self.self_norm(h_MSD), past)
        return h_MSD + self.dropout(self_MSD), present


class SelfBlock(nn.Module):
    """Pre-norm self-attention and FFN: the encoder's block, and the decoder-only reference's."""

    def __init__(self, options: ModelOptions, sparse: bool = False) -> None:
        super().__init__()
        d, eps = options.d_model, options.norm_eps
        self.self_norm = nn.RMSNorm(d, eps=eps)
        self.self_attention = SelfAttention(options)
        self.ffn_norm = nn.RMSNorm(d, eps=eps)
        self.ffn = SparseFFN(options) if sparse else SwiGLU(d, options.ffn_width)
        self.dropout = nn.Dropout(options.dropout)

    def forward(self, x_BND: Tensor, mask: Tensor, past: KeyValue | None = None) -> tuple[Tensor, KeyValue]:
        """Attend where `mask` (B, 1, N, past + N) is true. Returns the new states and all keys and values so far."""
        y_BND, present = self.self_attention(self.self_norm(x_BND), past, mask)
        x_BND = x_BND + self.dropout(y_BND)
        return x_BND + self.dropout(self.ffn(self.ffn_norm(x_BND))), present


class Encoder(nn.Module):
    """Bidirectional self-attention over the context (OneRec-V1, TIGER): what the lazy decoder does without."""

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(SelfBlock(options) for _ in range(options.encoder_layers))
        self.norm = nn.RMSNorm(options.d_model, eps=options.norm_eps)

    def forward(self, x_BPD: Tensor, real_BP: Tensor) -> Tensor:
        """Every position reads all real ones; at least one is. Returns (B, P, D)."""
        mask_B11P = real_BP[:, None, None]
        for block in self.blocks:
            x_BPD, _ = block(x_BPD, mask_B11P)
        return self.norm(x_BPD)
