"""Bytes of the tensors that a rank of the real engine holds, per parameter of a small model."""

import gc
import warnings

import torch
from torch import Tensor, nn

from onetrain.model.build import build
from onetrain.model.inputs import Context, Events
from onetrain.model.options import ModelOptions, Vocabulary
from onetrain.parallel import context_parallel
from onetrain.parallel.engine import Engine
from onetrain.parallel.mesh import Mesh
from onetrain.parallel.options import OptimizerOptions, ParallelOptions
from onetrain.parallel.process_group import Ranks

WIDTH = 256


class SmallModel(nn.Module):
    """Enough parameters that nothing else counts."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(1000, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(8))
        self.norm = nn.RMSNorm(WIDTH)

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.norm(x)


def bytes_per_parameter(ranks: Ranks, options: ParallelOptions, optimizer: OptimizerOptions) -> tuple[float, float]:
    """(between steps, after the last backward pass of a step) of everything allocated since the call."""
    warnings.simplefilter("ignore")
    before = live_storages()  # kept alive, so that no new storage has an old one's address
    model = SmallModel()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    engine = Engine(model, options, optimizer, ranks, total_steps=10)
    held: list[float] = []

    def measure() -> None:
        new = live_storages()
        held.append(sum(storage.nbytes() for address, storage in new.items() if address not in before) / parameters)

    def loss(module: nn.Module, words: Tensor) -> tuple[Tensor, float, dict[str, Tensor]]:
        return (module(words).float() ** 2).sum(), float(len(words)), {}

    batches = [torch.arange(2) + 2 * index for index in range(engine.mesh.accumulation_steps)]
    engine.train_step(batches, loss, lambda words: float(len(words)))
    measure()
    update = engine._update

    def measured_update() -> float:
        measure()
        return update()

    engine._update = measured_update  # type: ignore[method-assign]
    engine.train_step(batches, loss, lambda words: float(len(words)))
    engine.close()
    return held[0], held[1]


def saved_of_a_shared_history(ranks: Ranks, options: ModelOptions, length: int) -> int:
    """Bytes that autograd saves of one history that all ranks share, parameters left out."""
    torch.manual_seed(0)
    vocabulary = Vocabulary(codes=(9,), features={}, pathways={"history": length})
    model = build(options, vocabulary)
    parallel = ParallelOptions(context_parallel=ranks.world_size, global_batch_size=1)
    context_parallel.apply(model, context_parallel.start(Mesh.plan(ranks.world_size, parallel, options), 60))
    place = torch.arange(length)[None]
    events = Events(place[..., None] % 9, place, torch.tensor([length]), {})
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model.context(Context({"history": events}, {}))  # type: ignore[operator]
    total = sum(storage.nbytes() for storage in kept.values())
    out.x_BPD.sum().backward()
    return total


def live_storages() -> dict[int, torch.UntypedStorage]:
    """By address: storages of all tensors that Python knows, gradients too."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if isinstance(thing, Tensor) and thing.device.type == "cpu":
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None:
                    found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
    return found
