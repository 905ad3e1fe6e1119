"""Padding: from values of events, one row after another, to tensors of a rectangle.

Legend: B samples, N places of a row, E real events, one row after another, L numbers of each.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ids = NDArray[np.int64]


class Padding:
    """Puts values (E, ...) into rows (B, N, ...) of these lengths, zeros behind; N is at least 1.

    `planes`: how many (B, N) of int64 are going to be asked for. They lie in one block of memory: a large one that is
    zero from the start costs the system a fraction of what many small ones do.
    """

    def __init__(self, length_B: Ids, planes: int) -> None:
        self.real_BN = np.arange(max(1, int(length_B.max(initial=0)))) < length_B[:, None]
        self._block_PBN = np.zeros((planes, *self.real_BN.shape), dtype=np.int64)
        self._used = 0

    def __call__(self, values_E: NDArray) -> Tensor:
        """(B, N) of the values' own type; takes no plane."""
        out_BN = np.zeros(self.real_BN.shape, dtype=values_E.dtype)
        out_BN[self.real_BN] = values_E
        return torch.from_numpy(out_BN)

    def ids(self, values_E: NDArray) -> Tensor:
        """(B, N) int64 of integers of any type; takes a plane."""
        (out_BN,) = self._take(1)
        out_BN[self.real_BN] = values_E
        return torch.from_numpy(out_BN)

    def counted(self, first_B: Ids) -> Tensor:
        """(B, N) int64: first, first + 1 ... of each row; takes a plane."""
        (out_BN,) = self._take(1)
        np.add(np.arange(out_BN.shape[1]), first_B[:, None], out=out_BN, where=self.real_BN)
        return torch.from_numpy(out_BN)

    def rows(self, values_E: NDArray, width: int) -> Tensor:
        """(B, N, width) int64 of `whole_rows`; takes `width` planes."""
        out_BNL = self._take(width).reshape(*self.real_BN.shape, width)
        whole_rows(out_BNL)[self.real_BN] = values_E
        return torch.from_numpy(out_BNL)

    def _take(self, planes: int) -> Ids:
        self._used += planes
        return self._block_PBN[self._used - planes : self._used]


def whole_rows(values: Ids) -> NDArray[np.void]:
    """A view of (..., L) in which the last dimension is one value: it is looked up and copied several times as fast."""
    contiguous = np.ascontiguousarray(values)
    return contiguous.view(f"V{contiguous.itemsize * contiguous.shape[-1]}")[..., 0]
