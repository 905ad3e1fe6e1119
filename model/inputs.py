"""What the networks read: a context of events, and the targets that look at it.

Legend: B context rows, N context length, T target slots per row, L SID levels.
"""

from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Tensors:
    def to(self, device: torch.device | str) -> Self:
        """Copy of this record with every tensor on `device`."""
        return type(self)(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})


@dataclass(frozen=True)
class Context(_Tensors):
    """Event windows, oldest event first, padded at the end (int64 throughout)."""

    sid_BNL: Tensor  # semantic ids
    item_BN: Tensor  # item indices
    behaviour_BN: Tensor
    scenario_BN: Tensor
    gap_BN: Tensor  # bucketed logarithm of the time since the event before
    length_B: Tensor  # events before the padding


@dataclass(frozen=True)
class Targets(_Tensors):
    """Items to predict. A target sees the first `end` events of its row; a slot of weight 0 is padding."""

    sid_BTL: Tensor  # int64
    end_BT: Tensor  # int64
    weight_BT: Tensor  # float32
