"""Objects with tensors, on their way through Ray's object store without a copy on the reading side.

Ray keeps the buffers of numpy arrays apart from the rest of a message, and a reader on the same node sees them where
they lie, in shared memory. Torch tensors it would copy into the message; so they travel as arrays.
"""

import pickle
import warnings
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Parcel:
    """A packed object."""

    content: bytes
    buffers: list[pickle.PickleBuffer]  # of its tensors

    @classmethod
    def pack(cls, value: Any) -> "Parcel":
        """Pack an object; CPU tensors in it, however deep, are not copied."""
        content = BytesIO()
        buffers: list[pickle.PickleBuffer] = []
        _Packer(content, protocol=5, buffer_callback=buffers.append).dump(value)
        return cls(content.getvalue(), buffers)

    def open(self) -> Any:
        """The object. Its tensors share the parcel's memory, which is freed with the last of them: do not write."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
            return pickle.loads(self.content, buffers=self.buffers)


class _Packer(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        return (_tensor, (value.numpy(),)) if isinstance(value, Tensor) else NotImplemented


def _tensor(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(array)
