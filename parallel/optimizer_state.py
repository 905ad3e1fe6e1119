"""Where a rank's fp32 master weights and optimizer moments lie inside DeepSpeed, at any ZeRO stage.

A rank's parameters are the model's own, or parts of them (placement.py) where ranks share experts or layers. At stage 0
each is its own master. At stages 1 and 2 a parameter group is one flat tensor cut into equal partitions, one per rank
of the group that shares it (all data-parallel ranks; for experts, those that hold the same ones); at stage 3 each
parameter is cut into equal partitions, and a rank's pieces are flattened per sub-group. In every case the torch
optimizer holds flat tensors (`Flat.master`), and pieces of parameters lie in them at known offsets. DeepSpeed's own
`safe_get_full_optimizer_state` knows nothing at stage 0 and only the first parameter group at stages 1 and 2.
"""

from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from onetrain.parallel.engine import Engine
from onetrain.parallel.placement import Placement
from onetrain.parallel.process_group import Ranks

MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ()}
GATHER_CHUNK = 16_000_000  # elements per rank in one gather, so that rank 0's device never holds the whole model
VALUE = "value"  # beside the moments' names: the fp32 weight itself


@dataclass(frozen=True)
class Piece:
    """`numel` elements of a flattened parameter from `start`, at `offset` of the flat tensor of a partition."""

    name: str
    partition: int
    start: int
    offset: int
    numel: int


@dataclass(frozen=True)
class Flat:
    """One flat fp32 tensor that the torch optimizer updates here, and the pieces in it and in its peers elsewhere."""

    master: Tensor
    pieces: tuple[Piece, ...]
    partitions: int  # 1: every rank holds the whole flat tensor

    def tensors(self, engine: Engine) -> dict[str, Tensor]:
        """The master and its moments by name; moments are made, zero, where the optimizer has not stepped yet."""
        moments = MOMENTS[engine.optimizer_options.name]
        state = engine.optimizer.state[self.master]
        for moment in moments:
            if moment not in state:
                state[moment] = torch.zeros_like(self.master)
                state["step"] = torch.zeros((), dtype=torch.float32, device=self.master.device)
        return {VALUE: self.master.detach(), **{moment: state[moment] for moment in moments}}


def flats(engine: Engine) -> list[Flat]:
    """Every flat tensor of this rank, in the same order on all ranks."""
    shape = shapes(engine)  # at stage 3 a parameter itself is empty
    trainable = {n: p for n, p in engine.module.named_parameters() if p.requires_grad and torch.Size(shape[n]).numel()}
    if engine.zero_stage == 0:
        return [Flat(p, (Piece(name, 0, 0, 0, p.numel()),), 1) for name, p in trainable.items()]
    names = {id(parameter): name for name, parameter in trainable.items()}
    zero = engine.deepspeed.optimizer
    if engine.zero_stage == 3:
        return list(_partitioned_parameters(zero, names))
    return list(_partitioned_groups(zero, names))


def _partitioned_groups(zero: Any, names: dict[int, str]) -> Iterator[Flat]:
    """Stages 1 and 2: a group's parameters follow each other, padded, and are cut where the ranks' partitions meet."""
    if hasattr(zero, "bf16_groups"):  # BF16_Optimizer, stage 1 with fp32 gradient accumulation
        masters, groups = zero.fp32_groups_flat_partition, zero.bf16_groups
        offsets = [_running(parameters) for parameters in groups]
    else:
        masters, groups = zero.single_partition_of_fp32_groups, zero.round_robin_bit16_groups
        offsets = zero.round_robin_bit16_offsets
    sharing = [dist.get_world_size(group) for group in zero.real_dp_process_group]
    for master, parameters, group_offsets, partitions in zip(masters, groups, offsets, sharing, strict=True):
        size = master.numel()
        pieces = []
        for parameter, begin in zip(parameters, group_offsets, strict=True):
            end = begin + parameter.numel()
            for partition in range(begin // size, min((end - 1) // size + 1, partitions)):
                low, high = max(begin, partition * size), min(end, (partition + 1) * size)
                pieces.append(Piece(names[id(parameter)], partition, low - begin, low - partition * size, high - low))
        yield Flat(master, tuple(pieces), partitions)


def _partitioned_parameters(zero: Any, names: dict[int, str]) -> Iterator[Flat]:
    """Stage 3: every rank of a group holds the same share of each parameter, the last one padded."""
    for master, parameters in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
        pieces = []
        offset = 0
        partitions = dist.get_world_size(parameters[0].ds_process_group)
        for parameter in parameters:
            share = parameter.partition_numel()
            for partition in range(partitions):
                numel = min(share, parameter.ds_numel - partition * share)
                if numel > 0:
                    pieces.append(Piece(names[id(parameter)], partition, partition * share, offset, numel))
            offset += share
        yield Flat(master, tuple(pieces), partitions)


def _running(parameters: list[Tensor]) -> list[int]:
    offsets, total = [], 0
    for parameter in parameters:
        offsets.append(total)
        total += parameter.numel()
    return offsets


def shapes(engine: Engine) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of this rank, whole where ZeRO-3 has cut it."""
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in engine.module.named_parameters()}


def canonical_shapes(engine: Engine) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of the model, which ranks may share."""
    local = shapes(engine)
    placed = {name: engine.placements.get(name, Placement(name)) for name in local}
    return {placed[name].name: placed[name].shape(shape) for name, shape in local.items()}


def gather(engine: Engine, kinds: tuple[str, ...] | None = None) -> dict[str, dict[str, Tensor]]:
    """{"value" | moment: {canonical name: whole fp32 tensor on CPU}} on rank 0, empty elsewhere; every rank takes part.

    `kinds` leaves out the others.
    """
    wanted = (VALUE, *MOMENTS[engine.optimizer_options.name]) if kinds is None else kinds
    full: dict[str, dict[str, Tensor]] = {kind: {} for kind in wanted}
    local_shape, shape = shapes(engine), canonical_shapes(engine)
    placements = placements_of_ranks(engine)
    for flat in flats(engine):
        # parts of a parameter are gathered from the ranks that share it; what every rank has, rank 0 has
        shared = any(piece.name in engine.placements for piece in flat.pieces)
        for kind, tensor in flat.tensors(engine).items():
            if kind not in wanted:
                continue
            everyone = flat.partitions > 1 or shared
            parts = (
                _gather_flat(tensor.detach().flatten(), engine.ranks) if everyone else [tensor.detach().cpu().flatten()]
            )
            if not engine.ranks.is_main:
                continue
            for name, ranks in holders(flat, engine, len(parts)).items():
                for members in ranks:
                    placement = placements[members[0]].get(name, Placement(name))
                    local = _joined(flat, name, [parts[rank] for rank in members], local_shape[name])
                    if placement.name not in full[kind]:
                        full[kind][placement.name] = torch.empty(shape[placement.name], dtype=torch.float32)
                    placement.paste(full[kind][placement.name], local)
    if VALUE in wanted:
        with frozen_parameters(engine) as frozen:
            if engine.ranks.is_main:
                full[VALUE].update({name: frozen_value(engine, name, p).clone() for name, p in frozen.items()})
    return full


def _part(engine: Engine, name: str, rank: int) -> tuple[int, int]:
    """Which part of the canonical parameter a rank's parameter is; ranks of one part hold the same."""
    mesh = engine.mesh
    shares_experts = name in engine.expert_names
    return rank % mesh.tensor_parallel, mesh.data_rank(rank) % mesh.expert_parallel if shares_experts else 0


def _partition(engine: Engine, name: str, rank: int) -> int:
    """Which of ZeRO's partitions of its part a rank holds."""
    mesh = engine.mesh
    place = rank // mesh.tensor_parallel  # ZeRO cuts over data and context ranks alike
    return place // (mesh.expert_parallel if name in engine.expert_names else 1)


def placements_of_ranks(engine: Engine) -> list[dict[str, Placement]]:
    """Every rank's placements, on rank 0; its own of each rank elsewhere."""
    world = engine.ranks.world_size
    if not engine.placements or world == 1:
        return [engine.placements] * world
    received: list[Any] | None = [None] * world if engine.ranks.is_main else None
    dist.gather_object(engine.placements, received)
    return received or [engine.placements] * world


def holders(flat: Flat, engine: Engine, ranks: int) -> dict[str, list[list[int]]]:
    """For every parameter of a flat tensor, the lists of ranks that together hold a rank's whole part of it.

    Ranks of a list are in the order of the partitions. Ranks that hold the same part again are left out.
    """
    names = dict.fromkeys(piece.name for piece in flat.pieces)
    lists: dict[tuple[int, ...], list[int]] = {}
    for rank in range(ranks):
        members = lists.setdefault(_part(engine, next(iter(names)), rank), [])
        if len(members) < flat.partitions:
            members.append(rank)
    return {name: list(lists.values()) for name in names}


def _joined(flat: Flat, name: str, parts: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    """A rank's whole parameter out of the partitions of its flat tensor."""
    local = torch.empty(shape, dtype=torch.float32)
    for piece in flat.pieces:
        if piece.name == name:
            part = parts[piece.partition].narrow(0, piece.offset, piece.numel)
            local.view(-1).narrow(0, piece.start, piece.numel).copy_(part)
    return local


def scatter(
    engine: Engine, read: Callable[[str, str], Tensor], kinds: tuple[str, ...], keep: Container[str] = ()
) -> None:
    """Sets this rank's pieces of `kinds` ("value", moments) to `read(kind, canonical name)`, whole fp32 CPU tensors.

    Parameters named in `keep` stay as they are.

    With moments the optimizer's own step count becomes `engine.step`. Every rank takes part: the module's weights are
    then made from the masters.
    """
    for flat in flats(engine):
        tensors = flat.tensors(engine)
        rank = engine.ranks.rank
        mine = [p for p in flat.pieces if flat.partitions == 1 or p.partition == _partition(engine, p.name, rank)]
        for kind in kinds:
            for piece in mine:
                placement = engine.placements.get(piece.name, Placement(piece.name))
                if placement.name in keep:
                    continue
                local = placement.cut(read(kind, placement.name)).contiguous()
                part = local.view(-1).narrow(0, piece.start, piece.numel)
                tensors[kind].view(-1).narrow(0, piece.offset, piece.numel).copy_(part)
        if len(kinds) > 1:
            engine.optimizer.state[flat.master]["step"].fill_(engine.step)
    if VALUE in kinds:
        with frozen_parameters(engine) as frozen, torch.no_grad():
            for name, parameter in frozen.items():
                if name in keep:
                    continue
                parameter.copy_(read(VALUE, name))
                if name in engine.frozen_values:
                    engine.frozen_values[name].copy_(read(VALUE, name))
        _refresh_module(engine)


@contextmanager
def frozen_parameters(engine: Engine) -> Iterator[dict[str, nn.Parameter]]:
    """The parameters that no optimizer holds, by name, whole on every rank; rank 0's changes to them are kept."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    frozen = {name: p for name, p in engine.module.named_parameters() if not p.requires_grad}
    with GatheredParameters(list(frozen.values()), modifier_rank=0):
        yield frozen


def frozen_value(engine: Engine, name: str, parameter: nn.Parameter) -> Tensor:
    """In fp32 on the CPU, also where the model computes in bf16."""
    return engine.frozen_values.get(name, parameter.detach().float().cpu())


def _refresh_module(engine: Engine) -> None:
    """Copies the masters into the weights that the forward pass uses."""
    zero = engine.deepspeed.optimizer
    if engine.zero_stage in (1, 2):
        zero.update_lp_params()
    elif engine.zero_stage == 3:
        zero._partition_all_parameters()
        for sub_group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(sub_group)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def _gather_flat(tensor: Tensor, ranks: Ranks) -> list[Tensor]:
    """Every rank's `tensor` (one size on all), on rank 0's CPU."""
    parts = [torch.empty(tensor.numel(), dtype=torch.float32) for _ in range(ranks.world_size if ranks.is_main else 0)]
    for begin in range(0, tensor.numel(), GATHER_CHUNK):
        chunk = tensor[begin : begin + GATHER_CHUNK].to(ranks.device)
        received = [torch.empty_like(chunk) for _ in range(ranks.world_size)] if ranks.is_main else None
        dist.gather(chunk, received, dst=0)
        for part, piece in zip(parts, received or [], strict=True):
            part[begin : begin + GATHER_CHUNK].copy_(piece)
    return parts
