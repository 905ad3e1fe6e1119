"""Expert parallelism: DeepSpeed's AutoEP spreads the experts of every sparse block over ranks. All of AutoEP is here.

AutoEP replaces a block's SparseFFN by a layer that sends each token to the ranks of its experts and back. What that
layer computes stays the model's own: its router and experts run the functions of model/moe.py, so that routing, outputs
and gradients are those of one device. Experts that no rank count divides are padded with ones that the router does not
know.

Legend: R rows, S tokens per row, M = R * S, C choices, D width, E experts.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from onetrain.model.moe import Router, Routing, SparseFFN, route, router_logits, run_experts
from onetrain.model.options import MoEOptions
from onetrain.parallel.placement import Placement, padded, share

MATRICES = {"w1": "gate", "w2": "down", "w3": "up"}  # AutoEP's names: the model's


def group_name(ranks: int) -> str:
    """What DeepSpeed calls the process group of `ranks` ranks that share the experts."""
    return f"ep_size_{ranks}"


def prepare(model: nn.Module, ranks: int) -> None:
    """Pads every block's experts to a multiple of `ranks`, before the optimizer is made; new experts are zero."""
    for module in sparse_blocks(model).values():
        missing = -len(module.router.weight) % ranks
        if missing:
            for owner, name in ((module.router, "weight"), *((module.experts, name) for name in MATRICES.values())):
                whole = getattr(owner, name)
                padding = whole.new_zeros(missing, *whole.shape[1:])
                longer = nn.Parameter(torch.cat((whole.detach(), padding)), requires_grad=whole.requires_grad)
                setattr(owner, name, longer)


def deepspeed_section(options: MoEOptions, ranks: int) -> dict[str, Any]:
    """DeepSpeed's `expert_parallel` section for models of this project."""
    return {
        "enabled": True,
        "autoep_size": ranks,
        "moe_layer_pattern": r".*\.ffn",
        "router_pattern": "router",
        "expert_pattern": "experts",
        **{f"expert_{theirs}": ours for theirs, ours in MATRICES.items()},
        "has_shared_experts": options.shared > 0,
        "shared_experts_pattern": "shared" if options.shared else None,
        "top_k": options.top_k,
        "score_func": options.score,
        "score_apply": "post",
        "use_grouped_mm": False,  # of AutoEP's own product, which ours replaces
    }


def adopt(model: nn.Module, options: MoEOptions) -> None:
    """After `deepspeed.initialize`: gives AutoEP's layers the routing and the experts' product of model/moe.py."""
    for layer in autoep_layers(model).values():
        router = ParallelRouter(layer.router, options)
        layer.router = router
        layer.register_forward_pre_hook(partial(_note_row_length, router))
        layer.experts.forward = partial(_local_experts, layer.experts)


def placements(model: nn.Module, options: MoEOptions) -> dict[str, Placement]:
    """Where the parameters of AutoEP's layers lie in the model's own; by their names in `model`."""
    found = {}
    for path, layer in autoep_layers(model).items():
        found[f"{path}.router.gate.weight"] = padded(f"{path}.router.weight", layer.num_experts, options.experts)
        for theirs, ours in MATRICES.items():
            name = f"{path}.experts.{ours}"
            found[f"{path}.experts.{theirs}"] = share(name, layer.ep_rank, layer.ep_size, options.experts)
        if layer.shared_experts is not None:
            for name, _ in layer.shared_experts.named_parameters():
                found[f"{path}.shared_experts.{name}"] = Placement(f"{path}.shared.{name}")
    return found


def sparse_blocks(model: nn.Module) -> dict[str, SparseFFN]:
    """The sparse blocks of a model by name, before AutoEP has replaced them."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseFFN)}


def autoep_layers(model: nn.Module) -> dict[str, Any]:
    """AutoEP's layers by name."""
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

    return {name: module for name, module in model.named_modules() if isinstance(module, AutoEPMoELayer)}


def is_shared_out(parameter: nn.Parameter) -> bool:
    """Whether other ranks of the group hold other experts' values of this parameter."""
    return not getattr(parameter, "allreduce", True)


def grad_norm(gradients: Mapping[nn.Parameter, Tensor], group: str) -> Tensor:
    """L2 norm of all gradients of the whole model, given this rank's; equal on all ranks."""
    from deepspeed.utils import groups

    own = nn.utils.get_total_norm([g for p, g in gradients.items() if is_shared_out(p)]).square()
    dist.all_reduce(own, group=groups._get_expert_parallel_group(group))
    return (own + nn.utils.get_total_norm([g for p, g in gradients.items() if not is_shared_out(p)]).square()).sqrt()


class ParallelRouter(Router):
    """The model's router inside AutoEP's layer, on the weight that DeepSpeed manages."""

    def __init__(self, theirs: Any, options: MoEOptions) -> None:
        nn.Module.__init__(self)
        self.options = options
        self.gate = theirs.gate  # an nn.Linear; at ZeRO-3 its hooks gather the weight
        self.gate.forward = partial(_gate_logits, self.gate, options.experts)
        bias_E = theirs.e_score_correction_bias[: options.experts].float().clone()
        self.register_buffer("e_score_correction_bias", bias_E)
        self.record = None
        self.padded = theirs.num_experts - options.experts
        self.row_length = 1

    def forward(self, x_MD: Tensor, _: Tensor | None = None) -> Routing:
        """As Router, of rows laid end to end; counts go on over the padding experts."""
        logits_RSE = self.gate(x_MD.unflatten(0, (-1, self.row_length)))
        routing, self.record = route(logits_RSE, self.e_score_correction_bias, self.options, self.real_RS)
        return routing._replace(count_E=nn.functional.pad(routing.count_E, (0, self.padded)))


def _gate_logits(gate: nn.Linear, experts: int, x: Tensor) -> Tensor:
    return router_logits(x, gate.weight[:experts])


def _note_row_length(router: ParallelRouter, _: nn.Module, inputs: tuple[Tensor]) -> None:
    router.row_length = inputs[0].shape[1]


def _local_experts(experts: Any, x_CD: Tensor, count_E: Tensor) -> Tensor:
    """AutoEP's rows end in padding that belongs to no expert; its result is dropped."""
    rows = int(count_E.sum())
    y_CD = run_experts(x_CD[:rows], count_E, experts.w1, experts.w3, experts.w2)
    return nn.functional.pad(y_CD, (0, 0, 0, len(x_CD) - rows))
