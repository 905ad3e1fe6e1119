"""Layers of which every rank of a tensor-parallel group holds a part, as modules that stand where the whole ones stood.

They are megatron-core's, without the second value that those return. Parts are padded to equal sizes where they do not
divide; padding is zero, has no gradient, and no part in any result. Importing this takes seconds.

Legend: M targets, V codes per level, B rows, G KV groups, N positions, K head width.
"""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import layers
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from torch import Tensor, nn
from torch.nn import functional as F

from onetrain.parallel.placement import PADDING, Placement


class Column(layers.ColumnParallelLinear):
    """A linear layer's output features, cut: every rank reads all of the input and gives its part of the output."""

    def __init__(self, whole: nn.Linear, weight: Tensor, bias: Tensor | None, group: dist.ProcessGroup) -> None:
        super().__init__(
            whole.in_features,
            len(weight) * group.size(),
            config=_config(group),
            init_method=nn.init.zeros_,
            bias=bias is not None,
            tp_group=group,
        )
        self.weight = nn.Parameter(weight, whole.weight.requires_grad)
        if bias is not None:
            self.bias = nn.Parameter(bias, whole.bias.requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., own part of out)."""
        return super().forward(x)[0]


class Head(Column):
    """The head of one SID level: logits of this rank's codes; those of codes that do not exist are -inf."""

    padding_V: Tensor

    def __init__(self, whole: nn.Linear, weight: Tensor, placement: Placement, group: dist.ProcessGroup) -> None:
        super().__init__(whole, weight, None, group)
        assert placement.index is not None
        padding = placement.index == PADDING
        self.padded = bool(padding.any())
        self.register_buffer("padding_V", padding.to(weight.device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(M, D) to (M, own codes)."""
        logits_MV = super().forward(x)
        return logits_MV.masked_fill(self.padding_V, -torch.inf) if self.padded else logits_MV


class Row(layers.RowParallelLinear):
    """A linear layer's input features, cut: every rank reads its part of the input; the sum is the whole output."""

    def __init__(self, whole: nn.Linear, weight: Tensor, group: dist.ProcessGroup) -> None:
        assert whole.bias is None
        super().__init__(
            weight.shape[1] * group.size(),
            whole.out_features,
            config=_config(group),
            init_method=nn.init.zeros_,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=group,
        )
        self.weight = nn.Parameter(weight, whole.weight.requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        """(..., own part of in) to (..., out)."""
        return super().forward(x.contiguous())[0]  # megatron-core loses the sum of a product that is not contiguous


class Table(layers.VocabParallelEmbedding):
    """An embedding table's rows, cut: every rank looks its own up, and the sum is the embedding."""

    def __init__(self, whole: nn.Embedding, weight: Tensor, group: dist.ProcessGroup) -> None:
        super().__init__(
            len(weight) * group.size(),
            whole.embedding_dim,
            init_method=nn.init.zeros_,
            config=_config(group),
            tp_group=group,
        )
        self.weight = nn.Parameter(weight, whole.weight.requires_grad)
        self.weight.is_embedding = True  # type: ignore[attr-defined]

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (...) to (..., width)."""
        return super().forward(ids.contiguous())


class SharedGain(nn.RMSNorm):
    """RMSNorm of this rank's heads: all ranks hold the same gain, whose gradient is the sum of theirs."""

    def __init__(self, whole: nn.RMSNorm, group: dist.ProcessGroup) -> None:
        super().__init__(whole.normalized_shape, eps=whole.eps, elementwise_affine=False)
        self.weight = whole.weight
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as `x`."""
        return F.rms_norm(x, self.normalized_shape, copied(self.weight, self.group), self.eps)


class OwnGroups(nn.Module):
    """Of keys or values that every rank has made in full, the groups that this rank's query heads read.

    Query head j of H reads group j * G // H. Where the groups do not fall into equal runs of the rank's heads, each
    head gets a copy of its own.
    """

    def __init__(self, n_heads: int, groups: int, group: dist.ProcessGroup) -> None:
        super().__init__()
        own = n_heads // group.size()
        first = group.rank() * own
        read = [head * groups // n_heads for head in range(first, first + own)]
        runs = [read.count(each) for each in dict.fromkeys(read)]
        self.group = group
        self.first, self.last = read[0], read[-1] + 1
        self.copies = None if len(set(runs)) == 1 else runs

    def forward(self, x_BGNK: Tensor) -> Tensor:
        """(B, G, N, K) to (B, own groups, N, K)."""
        own_BGNK = copied(x_BGNK, self.group)[:, self.first : self.last]
        if self.copies is None:
            return own_BGNK
        return torch.cat(
            [part.expand(-1, n, -1, -1) for part, n in zip(own_BGNK.split(1, 1), self.copies, strict=True)], 1
        )


class VocabParallelCriterion(nn.Module):
    """`model.decoder.Criterion` of logits whose codes are cut over ranks, each with an equal share."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        assert group is parallel_state.get_tensor_model_parallel_group()  # vocab_parallel_cross_entropy knows no other
        self.group = group

    def forward(self, logits_MV: Tensor, codes_M: Tensor) -> tuple[Tensor, Tensor]:
        """Loss (calculated in fp32) and hit, (M,) each, equal on all ranks; of equal logits the lowest code is best."""
        hit_M = self._best(logits_MV.detach()) == codes_M
        own_MV = logits_MV.clone() if logits_MV.dtype == torch.float32 else logits_MV  # else overwritten in there
        loss_M = vocab_parallel_cross_entropy(own_MV, codes_M)
        return loss_M.double() if logits_MV.dtype == torch.float64 else loss_M, hit_M

    def _best(self, logits_MV: Tensor) -> Tensor:
        own_M, code_M = logits_MV.max(-1)
        own_M = own_M if own_M.dtype == torch.float64 else own_M.float()
        best_M = own_M.clone()
        dist.all_reduce(best_M, dist.ReduceOp.MAX, self.group)
        code_M = code_M + self.group.rank() * logits_MV.shape[-1]
        code_M = torch.where(own_M == best_M, code_M, torch.iinfo(torch.int64).max)
        dist.all_reduce(code_M, dist.ReduceOp.MIN, self.group)
        return code_M


class _Copied(torch.autograd.Function):
    """megatron-core's `copy_to_tensor_model_parallel_region`, whose backward overwrites the gradient it is given, and
    loses the sum where that is not contiguous.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group  # type: ignore[attr-defined]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)  # type: ignore[attr-defined]
        return grad, None


def copied(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`x`, which every rank of `group` has and uses in its own way: its gradient is the sum of theirs."""
    return _Copied.apply(x, group)


def _config(group: dist.ProcessGroup) -> ModelParallelConfig:
    layers.linear_with_grad_accumulation_and_async_allreduce.warned |= not torch.cuda.is_available()  # of CUDA streams
    return ModelParallelConfig(
        tensor_model_parallel_size=group.size(), use_cpu_initialization=True, perform_initialization=False
    )
