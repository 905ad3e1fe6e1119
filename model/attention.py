"""Attention of the lazy decoder: projection-free cross-attention and causal self-attention.

Legend: B context rows, Q query tokens per row, N context length, M targets, S new tokens per target, D width,
H query heads, G KV groups, K head width.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class KeyValue(NamedTuple):
    """One context KV set; with S_kv = 1 both fields are the same tensor."""

    key_BGNK: Tensor
    value_BGNK: Tensor


def attend(q_BHQK: Tensor, kv: KeyValue, mask: Tensor) -> Tensor:
    """Scaled dot-product attention, scores over sqrt(K) (assumption); a true `mask` entry may be seen.

    Query head j reads KV group floor(j * G / H). Returns (B, H, Q, K).
    """
    key, value = kv
    grouped = key.shape[1] != q_BHQK.shape[1]
    if q_BHQK.device.type == "cpu" and q_BHQK.dtype != torch.float64:
        # the CPU kernel's backward takes about 10 times as long in bf16 as in fp32
        y = F.scaled_dot_product_attention(
            q_BHQK.float(), key.float(), value.float(), attn_mask=mask, enable_gqa=grouped
        )
        return y.to(q_BHQK.dtype)
    return F.scaled_dot_product_attention(q_BHQK, key, value, attn_mask=mask, enable_gqa=grouped)


class CrossAttention(nn.Module):
    """Queries attend to the context's key/value set, which this module does not project (OneRec-V2, section 2.3)."""

    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.query = nn.Linear(d_model, d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x_BQD: Tensor, kv: KeyValue, mask_BQN: Tensor) -> Tensor:
        """Attend where `mask_BQN` is true; every query sees at least one position. Returns (B, Q, D)."""
        q_BHQK = self.query(x_BQD).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
        y_BHQK = attend(q_BHQK, kv, mask_BQN[:, None])
        return self.out(y_BHQK.transpose(1, 2).flatten(2))


class SelfAttention(nn.Module):
    """Causal self-attention over the few tokens of one target."""

    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x_MSD: Tensor, past: KeyValue | None = None) -> tuple[Tensor, KeyValue]:
        """Attend to the tokens of `past` and, causally, to the new ones.

        Returns the output (M, S, D) and the keys and values of all tokens so far, (M, H, past + S, K).
        """
        q, k, v = self.qkv(x_MSD).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        if past is not None:
            k, v = torch.cat((past.key_BGNK, k), dim=2), torch.cat((past.value_BGNK, v), dim=2)
        new, total = q.shape[2], k.shape[2]
        causal = torch.ones(new, total, dtype=torch.bool, device=q.device).tril(total - new)
        present = KeyValue(k, v)
        return self.out(attend(q, present, causal).transpose(1, 2).flatten(2)), present
