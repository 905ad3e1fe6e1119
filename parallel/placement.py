"""Where a rank's part of a parameter lies in the whole one, which checkpoints, exports and evaluation know."""

from dataclasses import dataclass

import torch
from torch import Tensor

PADDING = -1


@dataclass(frozen=True)
class Placement:
    """A parameter of this rank is the slices `index` of the canonical parameter `name` along `dim`.

    Slices of index PADDING exist on this rank only: they are zero, and no part of the model. With `dim` None the rank
    holds the whole parameter.
    """

    name: str
    dim: int | None = None
    index: Tensor | None = None  # int64, one entry per local slice
    size: int = 0  # of the canonical parameter along `dim`

    def shape(self, local: tuple[int, ...]) -> tuple[int, ...]:
        """The canonical shape, given the local one."""
        return local if self.dim is None else (*local[: self.dim], self.size, *local[self.dim + 1 :])

    def cut(self, full: Tensor) -> Tensor:
        """This rank's part of the whole parameter."""
        if self.dim is None or self.index is None:
            return full
        part = full.index_select(self.dim, self.index.clamp_min(0))
        padding = self.index == PADDING
        if padding.any():
            part.index_fill_(self.dim, padding.nonzero().squeeze(1), 0)
        return part

    def paste(self, full: Tensor, local: Tensor) -> None:
        """Writes this rank's part into the whole parameter, in place."""
        if self.dim is None or self.index is None:
            full.copy_(local)
            return
        real = (self.index != PADDING).nonzero().squeeze(1)
        full.index_copy_(self.dim, self.index[real], local.index_select(self.dim, real))


def share(name: str, part: int, parts: int, size: int, dim: int = 0, runs: int = 1) -> Placement:
    """The `part`-th of `parts` equal shares of slices, the last ones padded where `parts` does not divide `size`.

    With `runs` the slices are so many equal runs, such as queries, keys and values, and the share is one of each.
    """
    length = size // runs
    own = -(-length // parts)
    index = torch.arange(part * own, (part + 1) * own)
    index = torch.cat([torch.where(index < length, run * length + index, PADDING) for run in range(runs)])
    return Placement(name, dim, index, size)


def padded(name: str, length: int, size: int, dim: int = 0) -> Placement:
    """All `size` slices, and padding up to `length`."""
    index = torch.arange(length)
    return Placement(name, dim, torch.where(index < size, index, PADDING), size)
