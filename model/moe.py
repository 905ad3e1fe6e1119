"""Sparse experts in place of a block's FFN, as DeepSeek-V3 routes them (arXiv 2412.19437, sections 2.1.2; OneRec-V2,
section 2.4): each token runs through its top-k experts and the shared ones, and no token is dropped.

Legend: R rows (targets; for decoder-only, context rows), S tokens per row, M = R * S tokens, E routed experts,
K of them for each token, C = M * K choices, sorted by expert, D width, W hidden width of an expert.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onetrain.model.ffn import SwiGLU
from onetrain.model.options import ModelOptions, MoEOptions
from onetrain.model.precision import wide


class Routing(NamedTuple):
    """Where the tokens go."""

    weight_MK: Tensor
    expert_MK: Tensor
    count_E: Tensor  # int32


class RouterRecord(NamedTuple):
    """What a router's last forward decided: for telemetry, balancing and the auxiliary losses."""

    load_SE: Tensor  # choices of every expert by the token's position in its row, int64
    entropy: Tensor  # of the normalised scores, summed over tokens
    loss_R: Tensor | None  # auxiliary losses of every row, each times its weight


class RoutingSummary(NamedTuple):
    """The records of a model's sparse blocks, Z of them."""

    load_ZSE: Tensor
    entropy_Z: Tensor
    loss_R: Tensor | None


class Router(nn.Module):
    """Scores of every expert, and the top k of score + bias."""

    e_score_correction_bias: Tensor
    real_RS: Tensor | None = None  # tokens that are no padding, for the record; None = all

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        self.options = options.moe
        self.weight = nn.Parameter(torch.empty(options.moe.experts, options.d_model))
        # DeepSeek-V3's name; moved by `balanced_bias`, not by a gradient
        self.register_buffer("e_score_correction_bias", torch.zeros(options.moe.experts))
        self.record: RouterRecord | None = None

    def forward(self, x_RSD: Tensor) -> Routing:
        """The routing of every token; keeps a record of it."""
        logits_RSE = router_logits(x_RSD, self.weight)
        routing, self.record = route(logits_RSE, self.e_score_correction_bias, self.options, self.real_RS)
        return routing


class Experts(nn.Module):
    """Routed SwiGLU experts, one grouped matrix product for each of their three matrices."""

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        experts, d, width = options.moe.experts, options.d_model, options.expert_width
        self.gate = nn.Parameter(torch.empty(experts, width, d))
        self.up = nn.Parameter(torch.empty(experts, width, d))
        self.down = nn.Parameter(torch.empty(experts, d, width))

    def forward(self, x_CD: Tensor, count_E: Tensor) -> Tensor:
        """Rows of `x_CD` lie expert after expert, `count_E` of each. Returns (C, D)."""
        return run_experts(x_CD, count_E, self.gate, self.up, self.down)


class SparseFFN(nn.Module):
    """Router, routed experts and shared experts on one device."""

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        shared_width = options.moe.shared * options.expert_width
        self.router = Router(options)
        self.experts = Experts(options)
        self.shared = SwiGLU(options.d_model, shared_width) if options.moe.shared else None

    def forward(self, x_RSD: Tensor) -> Tensor:
        """Same shape as `x_RSD`."""
        weight_MK, expert_MK, count_E = self.router(x_RSD)
        x_MD = x_RSD.flatten(0, 1)
        order_C = expert_MK.flatten().argsort(stable=True)
        sorted_CD = self.experts(x_MD.index_select(0, order_C // expert_MK.shape[1]), count_E)
        y_CD = torch.empty_like(sorted_CD).index_copy(0, order_C, sorted_CD)
        y_MKD = y_CD.unflatten(0, expert_MK.shape)
        y_RSD = (y_MKD * weight_MK[..., None]).sum(1).to(x_MD.dtype).view_as(x_RSD)
        return y_RSD if self.shared is None else y_RSD + self.shared(x_RSD)


def router_logits(x: Tensor, weight_ED: Tensor) -> Tensor:
    """(..., D) to (..., E), in fp32 at least: in bf16 close scores would tie."""
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(wide(x), wide(weight_ED))


def route(
    logits_RSE: Tensor, bias_E: Tensor, options: MoEOptions, real_RS: Tensor | None = None
) -> tuple[Routing, RouterRecord]:
    """The top k of score + bias, weighted by their scores without the bias (DeepSeek-V3, eq. 12 to 16).

    With groups of experts, only those of the best `top_groups` groups are eligible; a group counts as the sum of its
    two best (biased) scores. Padding, where `real_RS` is false, is routed too, but is no part of the record.
    """
    score_RSE = logits_RSE.sigmoid() if options.score == "sigmoid" else logits_RSE.softmax(-1)
    choice_RSE = score_RSE.detach() + bias_E
    if options.groups > 1:
        choice_RSE = _only_best_groups(choice_RSE, options)
    expert_RSK = choice_RSE.topk(options.top_k, dim=-1).indices
    weight_RSK = score_RSE.gather(-1, expert_RSK)
    if options.renormalise:
        weight_RSK = weight_RSK / (weight_RSK.sum(-1, keepdim=True) + 1e-20)
    weight_RSK = weight_RSK * options.scale
    if real_RS is None:
        real_RS = torch.ones_like(logits_RSE[..., 0], dtype=torch.bool)
    record = _record(logits_RSE, score_RSE, expert_RSK, real_RS, options)
    count_E = expert_RSK.flatten().bincount(minlength=len(bias_E)).int()
    return Routing(weight_RSK.flatten(0, 1), expert_RSK.flatten(0, 1), count_E), record


def run_experts(x_CD: Tensor, count_E: Tensor, gate_EWD: Tensor, up_EWD: Tensor, down_EDW: Tensor) -> Tensor:
    """(silu(x W_gate) * x W_up) W_down of every row's expert; rows lie expert after expert. Returns (C, D)."""
    end_E = count_E.cumsum(0, dtype=torch.int32)
    hidden_CW = F.silu(_grouped_linear(x_CD, gate_EWD, end_E)) * _grouped_linear(x_CD, up_EWD, end_E)
    return _grouped_linear(hidden_CW, down_EDW, end_E)


def balanced_bias(bias_E: Tensor, load_E: Tensor, rate: float) -> Tensor:
    """Loss-free balancing: an expert with less than the mean load becomes easier to choose by `rate`, one with more
    harder (DeepSeek-V3, section 2.1.2; megatron-core's get_updated_expert_bias).
    """
    return bias_E + rate * (load_E.double().mean() - load_E).sign().to(bias_E.dtype)


def routing_summary(model: nn.Module, by_position: bool) -> RoutingSummary | None:
    """Takes the records that the forward pass just done has left in the model's routers; None without experts.

    With `by_position` loads are split by the token's position in its row, else S is 1.
    """
    known = [router.record for router in routers(model) if router.record is not None]
    for router in routers(model):
        router.record = None  # its losses would keep the graph alive
    if not known:
        return None
    loads = [record.load_SE if by_position else record.load_SE.sum(0, keepdim=True) for record in known]
    losses = [record.loss_R for record in known if record.loss_R is not None]
    loss_R = torch.stack(losses).sum(0) if losses else None
    return RoutingSummary(torch.stack(loads), torch.stack([record.entropy for record in known]), loss_R)


def routers(model: nn.Module) -> list[Router]:
    """The routers of all sparse blocks, in order."""
    return [module for module in model.modules() if isinstance(module, Router)]


def note_padding(model: nn.Module, real_RS: Tensor | None) -> None:
    """Tells every router which tokens of its next forward passes are no padding; None = all."""
    for router in routers(model):
        router.real_RS = real_RS


def _grouped_linear(x_CI: Tensor, weight_EOI: Tensor, end_E: Tensor) -> Tensor:
    """Every row times the matrix of its expert; `end_E` is where each expert's rows end."""
    strides = (size * x_CI.element_size() for size in weight_EOI.shape[1:])
    if x_CI.dtype != torch.float64 and all(stride % 16 == 0 for stride in strides):
        return _GroupedLinear.apply(x_CI, weight_EOI, end_E)
    # what grouped_mm refuses: float64, and rows that do not start at multiples of 16 bytes
    counts = end_E.diff(prepend=end_E.new_zeros(1)).tolist()
    return torch.cat([F.linear(part, weight) for part, weight in zip(x_CI.split(counts), weight_EOI, strict=True)])


class _GroupedLinear(torch.autograd.Function):
    """`grouped_mm` that keeps the weight itself for the backward pass and no view of it: an engine that takes weights
    away between the passes (ZeRO-3) can then free them, as it does those of linear layers.
    """

    @staticmethod
    def forward(ctx: Any, x_CI: Tensor, weight_EOI: Tensor, end_E: Tensor) -> Tensor:
        ctx.save_for_backward(x_CI, weight_EOI, end_E)
        return F.grouped_mm(x_CI, weight_EOI.transpose(1, 2), offs=end_E)

    @staticmethod
    def backward(ctx: Any, grad_CO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_CI, weight_EOI, end_E = ctx.saved_tensors
        grad_CO = grad_CO.contiguous()
        of_x, of_weight, _ = ctx.needs_input_grad
        return (
            F.grouped_mm(grad_CO, weight_EOI, offs=end_E) if of_x else None,
            F.grouped_mm(grad_CO.t(), x_CI, offs=end_E) if of_weight else None,
            None,
        )


def _only_best_groups(choice_RSE: Tensor, options: MoEOptions) -> Tensor:
    grouped = choice_RSE.unflatten(-1, (options.groups, -1))
    best = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
    kept = torch.zeros_like(best, dtype=torch.bool).scatter(-1, best.topk(options.top_groups, dim=-1).indices, True)
    return grouped.masked_fill(~kept[..., None], -torch.inf).flatten(-2)


def _record(
    logits_RSE: Tensor, score_RSE: Tensor, expert_RSK: Tensor, real_RS: Tensor, options: MoEOptions
) -> RouterRecord:
    share_RSE = score_RSE / (score_RSE.sum(-1, keepdim=True) + 1e-20)
    tokens, experts = logits_RSE.shape[1:]
    place_S1 = torch.arange(tokens, device=expert_RSK.device)[:, None] * experts
    bin_RSK = (place_S1 + expert_RSK).where(real_RS[..., None], tokens * experts)  # padding has a bin of its own
    load_SE = bin_RSK.flatten().bincount(minlength=tokens * experts + 1)[:-1].view(tokens, experts)
    entropy = (torch.special.entr(share_RSE.detach()) * real_RS[..., None]).sum()
    part_RS = real_RS.to(score_RSE.dtype) / real_RS.sum(1, keepdim=True).clamp_min(1)  # of its row's mean
    losses = []
    if options.sequence_loss > 0:  # DeepSeek-V3, eq. 17 to 20
        chosen_RSE = F.one_hot(expert_RSK, experts).sum(2)
        chosen_RE, share_RE = ((x_RSE * part_RS[..., None]).sum(1) for x_RSE in (chosen_RSE, share_RSE))
        losses.append(options.sequence_loss * experts / options.top_k * (chosen_RE * share_RE).sum(-1))
    if options.z_loss > 0:  # ST-MoE, eq. 5
        losses.append(options.z_loss * (logits_RSE.logsumexp(-1).square() * part_RS).sum(1))
    return RouterRecord(load_SE, entropy, torch.stack(losses).sum(0) if losses else None)
