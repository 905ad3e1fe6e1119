"""Writes a safetensors file piece by piece, in the file's order, with its xxh3_128: nothing is ever held whole.

The format: 8 bytes with the length of the header (little-endian), the header as JSON, then the tensors' raw bytes one
after the other. Wide element types come first, so that every tensor starts at a multiple of its element's size, which
the library's readers want. Writing and hashing large pieces leave Python's lock to other threads.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import xxhash
from torch import Tensor

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # name -> element type and shape
NAMES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
}
ALIGNMENT = 8  # of the first tensor
PIECE = 1 << 24  # bytes written and hashed at a time, while they are in the processor's cache


def file_order(layout: Layout) -> list[str]:
    """Names in the order in which `SafetensorsWriter.write` expects them."""
    return sorted(layout, key=lambda name: -layout[name][0].itemsize)  # stable: else as given


class SafetensorsWriter:
    """An open file. `write` appends; `close` checks that all is there, and syncs it to the disk."""

    def __init__(self, path: Path, layout: Layout) -> None:
        self.path = path
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # without it transformers refuses the file
        end = 0
        for name in file_order(layout):
            dtype, shape = layout[name]
            begin, end = end, end + dtype.itemsize * torch.Size(shape).numel()
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % ALIGNMENT)
        self.bytes = 8 + len(text) + end  # of the whole file
        self.written = 0
        self._digest = xxhash.xxh3_128()
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        self._append(memoryview(len(text).to_bytes(8, "little") + text))

    def write(self, tensor: Tensor) -> None:
        """Appends the elements of a contiguous CPU tensor: the next tensor of the file, or a part of it."""
        flat = tensor.detach().reshape(-1)
        if flat.numel():
            self._append(flat.view(torch.uint8).numpy().data)

    def close(self) -> dict[str, Any]:
        """Size and checksum. ValueError when tensors are missing or too many."""
        if self.written != self.bytes:
            raise ValueError(f"{self.path} got {self.written} of {self.bytes} bytes")
        os.fsync(self._file)
        self._close()
        return {"bytes": self.bytes, "xxh3_128": self._digest.hexdigest()}

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _append(self, data: memoryview) -> None:
        while data:
            piece = data[:PIECE]
            done = os.write(self._file, piece)
            self._digest.update(piece[:done])
            self.written += done
            data = data[done:]

    def _close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
