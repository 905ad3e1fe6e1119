"""Rotary positions of the split-half kind (KSA, section 2.2), the same for text and for summary tokens.

Legend: N rows, H heads, K head width.
"""

import torch
from torch import Tensor


def rotate(x_HNK: Tensor, position_N: Tensor, base: float) -> Tensor:
    """Turns every pair (i, i + K/2) of a head by position * base^(-2i/K); angles are fp32 at least."""
    half = x_HNK.shape[-1] // 2
    wide = torch.promote_types(x_HNK.dtype, torch.float32)
    frequency_F = base ** (-torch.arange(half, device=x_HNK.device, dtype=torch.float64) / half)
    angle_NF = position_N[:, None] * frequency_F
    cos_NF, sin_NF = angle_NF.cos().to(wide), angle_NF.sin().to(wide)
    first, second = x_HNK[..., :half], x_HNK[..., half:]
    return torch.cat((first * cos_NF - second * sin_NF, second * cos_NF + first * sin_NF), dim=-1).to(x_HNK.dtype)
