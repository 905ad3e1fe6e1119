"""What the networks read: a context of behaviour sequences, and the targets that look at it.

Legend: B context rows, N events of one sequence, T target slots per row, L SID levels.
"""

from dataclasses import dataclass, field, fields
from typing import Any, Self

import torch
from torch import Tensor


def _on(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, dict):
        return {name: _on(inner, device) for name, inner in value.items()}
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    return value.to(device)


@dataclass(frozen=True)
class _Tensors:
    def to(self, device: torch.device | str) -> Self:
        """Copy of this record with every tensor on `device`."""
        return type(self)(**{f.name: _on(getattr(self, f.name), device) for f in fields(self)})


@dataclass(frozen=True)
class Events(_Tensors):
    """One behaviour sequence per row, oldest event first, padded at the end (int64 throughout)."""

    sid_BNL: Tensor  # semantic ids
    index_BN: Tensor  # where the event stands in its row's window: a target of `end` e sees the events of index < e
    length_B: Tensor  # events before the padding
    features: dict[str, Tensor]  # ids (B, N) of every other feature


@dataclass(frozen=True)
class Context(_Tensors):
    """Named behaviour sequences (pathways) and the user's static features, ids (B,)."""

    sequences: dict[str, Events]
    user: dict[str, Tensor] = field(default_factory=dict)

    @property
    def length_B(self) -> Tensor:  # noqa: N802
        """Events of the first sequence: every context has one, and it tells the number of rows and the device."""
        return next(iter(self.sequences.values())).length_B


@dataclass(frozen=True)
class Targets(_Tensors):
    """Items to predict. A target sees its row's events of an index below `end`; slots of weight 0 are padding."""

    sid_BTL: Tensor  # int64
    end_BT: Tensor  # int64
    weight_BT: Tensor  # float32
    request: dict[str, Tensor] = field(default_factory=dict)  # ids (B, T) of the moment: scenario, hour, ...
    item: dict[str, Tensor] = field(default_factory=dict)  # ids (B, T) of the target item's features
    log_q_BT: Tensor | None = None  # float32: log of the item's share of the training events
