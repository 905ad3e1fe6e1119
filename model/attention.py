"""Attention of the decoders: cross-attention over the context, self-attention, and their gate and norms.

Legend: B context rows, Q query tokens per row, P context positions, M targets, S new tokens per target, D width,
H query heads, G KV groups, K head width.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onetrain.model.options import ModelOptions


class KeyValue(NamedTuple):
    """Keys and values of some positions; with S_kv = 1 both fields are the same tensor."""

    key_BGNK: Tensor
    value_BGNK: Tensor

    def select(self, source_M: Tensor) -> "KeyValue":
        """The rows `source_M`, as beams that continue them."""
        return KeyValue(self.key_BGNK.index_select(0, source_M), self.value_BGNK.index_select(0, source_M))


def attend(q_BHQK: Tensor, kv: KeyValue, mask: Tensor) -> Tensor:
    """Scaled dot-product attention, scores over sqrt(K) (assumption); a true `mask` entry may be seen.

    Query head j reads KV group floor(j * G / H). Returns (B, H, Q, K).
    """
    key, value = for_attention(kv)
    grouped = key.shape[1] != q_BHQK.shape[1]
    y_BHQK = F.scaled_dot_product_attention(q_BHQK.to(key.dtype), key, value, attn_mask=mask, enable_gqa=grouped)
    return y_BHQK.to(q_BHQK.dtype)


def for_attention(kv: KeyValue) -> KeyValue:
    """In the dtype that attention computes in: fp32 on CPU, whose kernel's backward takes 10 times as long in bf16.

    A set that several blocks read is converted once, before them.
    """
    key, value = kv
    if key.device.type != "cpu" or key.dtype == torch.float64:
        return kv
    wide = key.float()
    return KeyValue(wide, wide if value is key else value.float())


def split_heads(x_BND: Tensor, heads: int) -> Tensor:
    """(B, N, heads * K) to (B, heads, N, K)."""
    return x_BND.unflatten(-1, (heads, -1)).transpose(1, 2)


class OutputGate(nn.Module):
    """Score(X) = sigmoid(X W), which multiplies the concatenated heads before W_O (OneLive, section 3.2)."""

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        self.score = nn.Linear(options.d_model, options.d_model, bias=options.gate_bias is not None)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """Attention output `y` gated by the attention's input `x`, both (..., D)."""
        return y * torch.sigmoid(self.score(x))


class CrossAttention(nn.Module):
    """Queries attend to the context.

    shared_kv: to a key/value set that this module does not project (OneRec-V2, section 2.3). projected_kv: to the
    context's own W_k and W_v of this block (OneMall, section 3.2). With QK-norm, queries and projected keys are
    normalised per head with a learned gain (assumption); shared keys are normalised already.
    """

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        d, width = options.d_model, options.kv_groups * options.d_head
        projected = options.cross_attention == "projected_kv"
        self.n_heads, self.groups = options.n_heads, options.kv_groups
        self.query = nn.Linear(d, d, bias=False)
        self.key = nn.Linear(d, width, bias=False) if projected else None
        self.value = nn.Linear(d, width, bias=False) if projected else None
        self.out = nn.Linear(d, d, bias=False)
        self.gate = OutputGate(options) if options.output_gate else None
        self.q_norm = nn.RMSNorm(options.d_head, eps=options.norm_eps) if options.qk_norm else None
        self.k_norm = nn.RMSNorm(options.d_head, eps=options.norm_eps) if options.qk_norm and projected else None
        self.own_groups: nn.Module = nn.Identity()  # under tensor parallelism: those that this rank's heads read

    def project(self, context_BPD: Tensor) -> KeyValue:
        """Keys and values of the context, (B, G, P, K) each; only for projected_kv."""
        assert self.key is not None
        assert self.value is not None
        key_BGPK = split_heads(self.key(context_BPD), self.groups)
        if self.k_norm is not None:
            key_BGPK = self.k_norm(key_BGPK)
        value_BGPK = split_heads(self.value(context_BPD), self.groups)
        return KeyValue(self.own_groups(key_BGPK), self.own_groups(value_BGPK))

    def forward(self, x_BQD: Tensor, kv: KeyValue, mask_BQP: Tensor) -> Tensor:
        """Attend where `mask_BQP` is true; every query sees at least one position. Returns (B, Q, D)."""
        q_BHQK = split_heads(self.query(x_BQD), self.n_heads)
        if self.q_norm is not None:
            q_BHQK = self.q_norm(q_BHQK)
        y_BQD = attend(q_BHQK, kv, mask_BQP[:, None]).transpose(1, 2).flatten(2)
        return self.out(y_BQD if self.gate is None else self.gate(y_BQD, x_BQD))


class SelfAttention(nn.Module):
    """Self-attention, causal unless a mask says otherwise."""

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        d = options.d_model
        self.n_heads = options.n_heads
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.out = nn.Linear(d, d, bias=False)
        self.gate = OutputGate(options) if options.output_gate else None
        self.q_norm = nn.RMSNorm(options.d_head, eps=options.norm_eps) if options.qk_norm else None
        self.k_norm = nn.RMSNorm(options.d_head, eps=options.norm_eps) if options.qk_norm else None

    def project(self, x_MSD: Tensor) -> tuple[Tensor, KeyValue]:
        """Queries (M, H, S, K), and the keys and values of the same tokens."""
        q, k, v = self.qkv(x_MSD).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, KeyValue(k, v)

    def output(self, y_MHSK: Tensor, x_MSD: Tensor) -> Tensor:
        """Heads joined, gated and projected: (M, S, D)."""
        y_MSD = y_MHSK.transpose(1, 2).flatten(2)
        return self.out(y_MSD if self.gate is None else self.gate(y_MSD, x_MSD))

    def forward(
        self, x_MSD: Tensor, past: KeyValue | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, KeyValue]:
        """Attend to the tokens of `past` and to the new ones: causally, or where `mask` (M, 1, S, past + S) is true.

        Returns the output (M, S, D) and the keys and values of all tokens so far, (M, H, past + S, K).
        """
        q, present = self.project(x_MSD)
        if past is not None:
            present = KeyValue(*(torch.cat(pair, dim=2) for pair in zip(past, present, strict=True)))
        if mask is None:
            new, total = q.shape[2], present.key_BGNK.shape[2]
            mask = torch.ones(new, total, dtype=torch.bool, device=q.device).tril(total - new)
        return self.output(attend(q, present, mask), x_MSD), present
