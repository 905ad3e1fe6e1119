"""A rank's own share of the state, copied to host memory in a moment, and brought together on rank 0 later.

What each rank holds of masters and moments is in its flat tensors (optimizer_state.py). Rank 0 plans once which ranks
send which pieces, so that they arrive in the order of the file: rank 0 then never holds more than one whole parameter,
and that only where ranks hold parts that are no runs of it (experts, layers). Pieces travel over a process group of
their own (gloo), which no other thread uses.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from onetrain.parallel.engine import Engine
from onetrain.parallel.optimizer_state import (
    MOMENTS,
    VALUE,
    Flat,
    canonical_shapes,
    flats,
    frozen_parameters,
    frozen_value,
    holders,
    placements_of_ranks,
    shapes,
)
from onetrain.parallel.placement import Placement
from onetrain.parallel.safetensors_writer import Layout

CHUNK = 1 << 22  # elements of one message
TIMEOUT_S = 24 * 3600.0  # ranks wait while rank 0's disk is slow; one that dies is noticed at once
Outside = dict[str, Tensor]  # what no optimizer holds: frozen parameters and persistent buffers


class StoppedError(Exception):
    """The engine was closed while its state was brought together."""


class Run(NamedTuple):
    """`numel` elements of a rank's flat tensor, from `offset`."""

    rank: int
    flat: int
    offset: int
    numel: int


@dataclass(frozen=True)
class Part:
    """A rank's whole local parameter, in runs of several ranks, and where it lies in the canonical one."""

    placement: Placement
    shape: tuple[int, ...]
    runs: tuple[Run, ...]


class Snapshot:
    """Takes copies of an engine's state; one at a time."""

    def __init__(self, engine: Engine) -> None:
        """Every rank takes part: makes the process group and the plan."""
        self.engine, self.ranks = engine, engine.ranks
        self.kinds = (VALUE, *MOMENTS[engine.optimizer_options.name])
        self.stopped = False
        self.group: dist.ProcessGroup | None = None
        if self.ranks.world_size > 1:
            self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=TIMEOUT_S))
        self.flats = flats(engine)
        self.shape = canonical_shapes(engine)
        self.trainable, self.parts = self._plan()  # on rank 0; empty elsewhere
        self.runs = self._own_runs()
        self._copied_flats = sorted({run.flat for run in self.runs})
        self._buffers: dict[tuple[str, int], Tensor] = {}  # kind, flat: host memory for copies, used again
        self._host: dict[tuple[str, int], Tensor] = {}  # what `take` noted: those buffers, or live tensors
        self._outside: Outside = {}

    def take(self, copy: bool) -> None:
        """Notes the state as it is now; every rank takes part. Without `copy` it must not change while it is gathered.

        Copies stay in host memory, which the next call uses again; on a GPU they are made in any case.
        """
        on_gpu = self.ranks.device.type == "cuda"
        for index in self._copied_flats:
            for kind, tensor in self.flats[index].tensors(self.engine).items():
                source = tensor.detach().reshape(-1)
                if not copy and not source.is_cuda:
                    self._host[kind, index] = source
                    continue
                host = self._buffers.get((kind, index))
                if host is None:
                    host = self._buffers[kind, index] = torch.empty(source.shape, dtype=source.dtype, pin_memory=on_gpu)
                self._host[kind, index] = host
                host.copy_(source, non_blocking=source.is_cuda)
        with frozen_parameters(self.engine) as frozen:
            if self.ranks.is_main:
                outside = {name: frozen_value(self.engine, name, p) for name, p in frozen.items()}
                self._outside = {name: value.clone() for name, value in outside.items()}
                buffers = persistent_buffers(self.engine.module)
                self._outside |= {name: b.detach().to("cpu", copy=True).contiguous() for name, b in buffers.items()}
        if on_gpu:
            torch.cuda.synchronize(self.ranks.device)

    def layouts(self) -> tuple[Layout, Layout]:
        """Of the model's file and of the optimizer's, on rank 0."""
        shape = self.shape
        model = {name: (torch.float32, shape[name]) for name in shape if name in self.trainable}
        model |= {name: (value.dtype, tuple(value.shape)) for name, value in self._outside.items()}
        moments = self.kinds[1:]
        optimizer = {f"{kind}/{name}": (torch.float32, shape[name]) for kind in moments for name in self.trainable}
        return model, optimizer

    def send(self) -> None:
        """On the other ranks: sends what rank 0 asks for, in its order. Runs in any one thread."""
        for kind in self.kinds:
            for run in self.runs:
                for chunk in _chunks(run):
                    self._check()
                    dist.send(self._of(kind, chunk), dst=0, group=self.group)

    def arriving(self) -> Iterator[Tensor]:
        """On rank 0: everything in the order of `kinds` and `trainable`, in pieces for `elements` to put together.

        It must be drawn to its end, or the other ranks are left waiting. A piece is valid until the next one. Received
        one message ahead. Runs in any one thread.
        """
        order = [run for name in self.trainable for part in self.parts[name] for run in part.runs]
        chunks = [(kind, chunk) for kind in self.kinds for run in order for chunk in _chunks(run)]
        size = max((chunk.numel for _, chunk in chunks), default=0)
        boxes = [torch.empty(size, dtype=torch.float32) for _ in range(2)]

        def start(number: int) -> tuple[Tensor, Any]:
            self._check()
            kind, chunk = chunks[number]
            if chunk.rank == self.ranks.rank:
                return self._of(kind, chunk), None
            box = boxes[number % 2].narrow(0, 0, chunk.numel)
            return box, dist.irecv(box, src=chunk.rank, group=self.group)

        coming = start(0) if chunks else None
        for number in range(len(chunks)):
            assert coming is not None
            tensor, work = coming
            if work is not None:
                work.wait()
            coming = start(number + 1) if number + 1 < len(chunks) else None
            yield tensor

    def elements(self, name: str, arriving: Iterator[Tensor]) -> Iterator[Tensor]:
        """On rank 0: a whole trainable parameter's elements in order, out of the pieces that arrive next."""
        parts = self.parts[name]
        if parts[0].placement.dim is None:
            for run in parts[0].runs:
                for _ in _chunks(run):
                    yield next(arriving)
            return
        full = torch.empty(parts[0].placement.shape(parts[0].shape), dtype=torch.float32)
        for part in parts:
            local = torch.empty(torch.Size(part.shape).numel(), dtype=torch.float32)
            at = 0
            for run in part.runs:
                for chunk in _chunks(run):
                    local.narrow(0, at, chunk.numel).copy_(next(arriving))
                    at += chunk.numel
            part.placement.paste(full, local.view(part.shape))
        yield full

    def outside(self, name: str) -> Tensor | None:
        """On rank 0: a frozen parameter or persistent buffer."""
        return self._outside.get(name)

    def stop(self) -> None:
        """Ends a gathering that is under way in another thread."""
        self.stopped = True
        if self.group is not None:
            backend: Any = self.group._get_backend(torch.device("cpu"))
            backend.abort()  # wakes a thread that waits for another rank

    def close(self) -> None:
        """Leaves the process group; no gathering is under way."""
        self._host.clear()
        self._buffers.clear()
        self._outside.clear()
        if self.group is not None and dist.is_initialized():
            dist.destroy_process_group(self.group)
        self.group = None

    def _plan(self) -> tuple[list[str], dict[str, list[Part]]]:
        """Trainable parameters in the order of the file, and their parts; rank 0 has those of all ranks."""
        placements = placements_of_ranks(self.engine)
        if not self.ranks.is_main:
            return [], {}
        parts: dict[str, list[Part]] = {}
        local_shape = shapes(self.engine)
        for index, flat in enumerate(self.flats):
            shared = any(piece.name in self.engine.placements for piece in flat.pieces)
            ranks = self.ranks.world_size if flat.partitions > 1 or shared else 1
            for name, lists in holders(flat, self.engine, ranks).items():
                for members in lists:
                    placement = placements[members[0]].get(name, Placement(name))
                    runs = tuple(_runs(flat, index, name, members))
                    known = parts.setdefault(placement.name, [])
                    if not known or placement.dim is not None:  # else the same again
                        known.append(Part(placement, local_shape[name], runs))
        return [name for name in self.shape if name in parts], parts

    def _own_runs(self) -> list[Run]:
        """What this rank sends, of every kind, in the order in which rank 0 receives."""
        of_rank: list[list[Run]] = [[] for _ in range(self.ranks.world_size)]
        for name in self.trainable:
            for part in self.parts[name]:
                for run in part.runs:
                    of_rank[run.rank].append(run)
        if self.ranks.world_size == 1:
            return of_rank[0]
        own: list[Any] = [None]
        dist.scatter_object_list(own, of_rank if self.ranks.is_main else None, src=0, group=self.group)
        return own[0]

    def _of(self, kind: str, run: Run) -> Tensor:
        return self._host[kind, run.flat].narrow(0, run.offset, run.numel)

    def _check(self) -> None:
        if self.stopped:
            raise StoppedError("the engine was closed")


def persistent_buffers(module: torch.nn.Module) -> dict[str, Tensor]:
    """Buffers that belong to the model's state, such as the routers' biases."""
    state = module.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in module.named_buffers() if name in state}


def _runs(flat: Flat, index: int, name: str, members: list[int]) -> Iterator[Run]:
    """The pieces of a rank's whole parameter, in its order."""
    pieces = sorted((piece for piece in flat.pieces if piece.name == name), key=lambda piece: piece.start)
    for piece in pieces:
        yield Run(members[piece.partition], index, piece.offset, piece.numel)


def _chunks(run: Run) -> Iterator[Run]:
    for begin in range(0, run.numel, CHUNK):
        yield run._replace(offset=run.offset + begin, numel=min(CHUNK, run.numel - begin))
