"""Tensor parallelism: a decoder's attention, FFNs, tables and heads cut over the ranks of a group, from outside.

What is cut (megatron-core's layers, in place of the whole ones):

- attention by query heads: queries, self-attention's keys and values, the output gate by columns, the output by rows.
  Projected context keys and values by KV groups where the degree divides them, else every rank makes all of them and
  reads its heads' groups, as it does of the shared key/value sets. Gains of QK-norm are whole, their gradients added.
- dense FFNs of blocks, encoder and MTP modules by hidden units; shared and routed experts are refused.
- heads and scenario biases by codes, with a vocab-parallel cross-entropy; tables of `MIN_ROWS` rows and more by rows.

Sizes that the degree does not divide are padded; only the query heads must be a multiple of it. All else is whole and
alike on every rank: norms, the context's projections, Query-Formers, item tower, the fusion of MTP modules, positions,
BOS and small tables. So ranks of a group must read the same samples and draw the same dropout masks.
"""

from collections.abc import Iterator, Mapping

import torch.distributed as dist
from torch import Tensor, nn

from onetrain.model.attention import CrossAttention, SelfAttention
from onetrain.model.context import ContextProcessor
from onetrain.model.contrastive import ItemTower
from onetrain.model.decoder import SidDecoder, SidTokens
from onetrain.model.features import EventFeatures, FeatureTables
from onetrain.model.ffn import SwiGLU
from onetrain.parallel.megatron_groups import ModelParallelUnit
from onetrain.parallel.placement import Placement, share

MIN_ROWS = 1024  # of a table that is cut: each look-up in one costs an all-reduce


def apply(model: SidDecoder, unit: ModelParallelUnit, min_rows: int = MIN_ROWS) -> dict[str, Placement]:
    """Changes `model`, whole and on any device, to this rank's part of it; every rank of the group takes part.

    All of them hold the same weights. Parameters keep their names. Returns for each of them where it lies in the whole
    model's. Parameters that are cut have `tensor_model_parallel` set, by which DeepSpeed knows that their gradients'
    squares add up.
    """
    cutter = _Cutter(model, unit.tensor)
    for path, module in list(model.named_modules()):
        if isinstance(module, SelfAttention | CrossAttention):
            cutter.attention(path, module)
    for path in _ffns(model):
        cutter.column(f"{path}.gate_up", runs=2)
        cutter.row(f"{path}.down")
    for path in _tables(model):
        cutter.table(path, min_rows)
    cutter.tokens("tokens", model.tokens)
    cutter.shared_sets(model)
    return cutter.placements


def grad_norm(gradients: Mapping[nn.Parameter, Tensor], unit: ModelParallelUnit) -> Tensor:
    """L2 norm of all gradients of the whole model, given this rank's part of them; equal on all ranks of the group."""
    counted = [g for p, g in gradients.items() if _is_cut(p) or unit.tensor.rank() == 0]
    square = nn.utils.get_total_norm(counted).square()
    dist.all_reduce(square, group=unit.tensor)
    return square.sqrt()


class _Cutter:
    """Replaces layers of `model` by this rank's part of them, and keeps account of where the part lies."""

    def __init__(self, model: SidDecoder, group: dist.ProcessGroup) -> None:
        from onetrain.parallel import megatron_layers  # late: megatron-core takes seconds to import

        self.layers = megatron_layers
        self.model, self.group = model, group
        self.rank, self.ranks = group.rank(), group.size()
        self.placements = {name: Placement(name) for name, _ in model.named_parameters()}

    def attention(self, path: str, module: SelfAttention | CrossAttention) -> None:
        """Query heads are this rank's share; their number is `n_heads` of the module."""
        heads = module.n_heads
        module.n_heads = heads // self.ranks
        norms = ["q_norm", "k_norm"]
        if isinstance(module, SelfAttention):
            self.column(f"{path}.qkv", runs=3)
        else:
            self.column(f"{path}.query")
            if module.key is not None:
                norms = self._context_keys(path, module, heads)
        for name in norms:
            norm = getattr(module, name)
            if norm is not None:
                setattr(module, name, self.layers.SharedGain(norm, self.group))
        if module.gate is not None:
            self.column(f"{path}.gate.score")
        self.row(f"{path}.out")

    def _context_keys(self, path: str, module: CrossAttention, heads: int) -> list[str]:
        """Returns the norms that are of this rank's heads only."""
        if module.groups % self.ranks:
            module.own_groups = self.layers.OwnGroups(heads, module.groups, self.group)
            return ["q_norm"]
        module.groups //= self.ranks
        self.column(f"{path}.key")
        self.column(f"{path}.value")
        return ["q_norm", "k_norm"]

    def shared_sets(self, model: SidDecoder) -> None:
        """Key/value sets that are no block's own: every rank makes them whole."""
        context, options = model.get_submodule("context"), model.options
        assert isinstance(context, ContextProcessor)
        if len(context.key_norms):
            context.own_groups = self.layers.OwnGroups(options.n_heads, options.kv_groups, self.group)

    def column(self, path: str, runs: int = 1) -> None:
        """Output features, which are so many equal runs: of each a share."""
        whole = self._linear(path)
        weight = self._cut(f"{path}.weight", whole.weight, 0, runs)
        bias = None if whole.bias is None else self._cut(f"{path}.bias", whole.bias, 0, runs)
        self._replace(path, self.layers.Column(whole, weight, bias, self.group))

    def row(self, path: str) -> None:
        """Input features."""
        whole = self._linear(path)
        self._replace(path, self.layers.Row(whole, self._cut(f"{path}.weight", whole.weight, 1), self.group))

    def table(self, path: str, min_rows: int) -> None:
        """Rows of an embedding table that has so many."""
        whole = self.model.get_submodule(path)
        assert isinstance(whole, nn.Embedding)
        if whole.num_embeddings >= min_rows:
            self._replace(path, self.layers.Table(whole, self._cut(f"{path}.weight", whole.weight, 0), self.group))

    def tokens(self, path: str, tokens: SidTokens) -> None:
        """Heads, their biases, and the criterion of logits that are cut."""
        for level in range(len(tokens.heads)):
            name = f"{path}.heads.{level}"
            whole = self._linear(name)
            weight = self._cut(f"{name}.weight", whole.weight, 0)
            placement = self.placements[f"{name}.weight"]
            self._replace(name, self.layers.Head(whole, weight, placement, self.group))
        for level, bias in enumerate(tokens.head_biases):
            name = f"{path}.head_biases.{level}.weight"
            assert isinstance(bias, nn.Embedding)
            bias.weight = nn.Parameter(self._cut(name, bias.weight, 1), bias.weight.requires_grad)
            bias.embedding_dim = bias.weight.shape[1]
            self._mark(bias, name)
        tokens.criterion = self.layers.VocabParallelCriterion(self.group)

    def _linear(self, path: str) -> nn.Linear:
        module = self.model.get_submodule(path)
        assert isinstance(module, nn.Linear)
        return module

    def _cut(self, name: str, whole: Tensor, dim: int, runs: int = 1) -> Tensor:
        self.placements[name] = share(name, self.rank, self.ranks, whole.shape[dim], dim, runs)
        return self.placements[name].cut(whole.detach())

    def _replace(self, path: str, module: nn.Module) -> None:
        self.model.set_submodule(path, module)
        for name, _ in module.named_parameters():
            self._mark(module, f"{path}.{name}")

    def _mark(self, module: nn.Module, path: str) -> None:
        parameter = module.get_parameter(path.rpartition(".")[2])
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
        parameter.partition_dim = self.placements[path].dim  # type: ignore[attr-defined]


def _ffns(model: SidDecoder) -> Iterator[str]:
    """Paths of the FFNs of blocks, encoder and MTP modules; those of Query-Formers are small and stay whole."""
    for path, module in list(model.named_modules()):
        if isinstance(module, SwiGLU) and path.startswith(("blocks.", "encoder.", "mtp.")):
            yield path


def _tables(model: SidDecoder) -> Iterator[str]:
    """Paths of all tables of ids: features, codes of events and items, codes of targets."""
    for path, module in list(model.named_modules()):
        if isinstance(module, FeatureTables):
            yield from (f"{path}.tables.{name}" for name in module.tables)
        elif isinstance(module, EventFeatures | ItemTower):
            yield from (f"{path}.sid_tables.{level}" for level in range(len(module.sid_tables)))
        elif isinstance(module, SidTokens):
            yield from (f"{path}.code_embeddings.{level}" for level in range(len(module.code_embeddings)))


def _is_cut(parameter: nn.Parameter) -> bool:
    return getattr(parameter, "tensor_model_parallel", False)
