"""One optimizer step of a model under DeepSpeed: the loss is normalised by the global sum of target weights.

Gradients are the sum over ranks and accumulation steps of each micro batch's loss sum, over the sum of all weights, so
that uneven batches equal one process. The optimizer is torch's own; ZeRO partitions its state.
"""

import copy
import io
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from onetrain.model.moe import balanced_bias, routers
from onetrain.parallel import context_parallel, expert_parallel, megatron_groups, tensor_parallel
from onetrain.parallel.apply import after_deepspeed, before_deepspeed
from onetrain.parallel.deepspeed_config import check_options, deepspeed_config
from onetrain.parallel.errors import ParallelError
from onetrain.parallel.options import OptimizerOptions, ParallelOptions
from onetrain.parallel.param_groups import learning_rate_factor, parameter_groups
from onetrain.parallel.process_group import Ranks, all_reduce_sum

if TYPE_CHECKING:
    from onetrain.parallel.snapshot import Snapshot

Batch = TypeVar("Batch")
LossParts = tuple[Tensor, Tensor | float, dict[str, Tensor]]  # sum of weighted losses, sum of weights, statistics


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did, equal on all ranks."""

    loss: float  # sum of weighted losses over sum of weights, over ranks and micro batches; 0 when no target counts
    weight: float  # global sum of target weights
    grad_norm: float  # L2 norm of all gradients, before clipping
    learning_rate: float  # of parameters that are not embeddings
    stats: dict[str, Tensor]  # the loss function's statistics, summed over ranks and micro batches; float64 on CPU
    discarded: Literal["", "loss", "gradient norm", "refused"] = ""  # what was not finite, or that `accepts` refused
    flagged: bool = False  # whether some rank raised its flag

    @property
    def done(self) -> bool:
        """False: the batch was discarded, and nothing is other than before it."""
        return not self.discarded


class Engine:
    """A model, its optimizer and DeepSpeed; `step` counts the optimizer steps done."""

    def __init__(
        self,
        model: nn.Module,
        parallel_options: ParallelOptions,
        optimizer_options: OptimizerOptions,
        ranks: Ranks,
        total_steps: int,
    ) -> None:
        """Moves `model` to the rank's device and hands it to DeepSpeed; every rank gets rank 0's weights.

        `total_steps` is where the learning rate schedule ends. Raises ParallelError for options that cannot work.
        """
        self.module = model
        self.options = parallel_options
        self.optimizer_options = optimizer_options
        self.ranks = ranks
        self.total_steps = total_steps
        self.mesh = check_options(parallel_options, ranks.world_size, getattr(model, "options", None))
        self.step = 0
        self.snapshot: Snapshot | None = None  # made by the first save
        self.at_close: list[Callable[[], None]] = []
        n_parameters = sum(parameter.numel() for parameter in model.parameters())
        config = deepspeed_config(parallel_options, self.mesh, n_parameters)
        self._skeleton = _on_meta(model)  # what the model was, to build it whole for evaluation
        applied = before_deepspeed(model, parallel_options, self.mesh, ranks.timeout_s)
        self.unit, self.experts_group = applied.unit, applied.experts_group
        self.context_group = applied.context_group

        import deepspeed  # late: it reads DS_ACCELERATOR, which process_group.start sets

        warnings.filterwarnings("ignore", "`torch.distributed.*` is deprecated", FutureWarning)  # DeepSpeed's own calls
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else compiled on CPU, for inference only
        # DeepSpeed casts weights that no optimizer has a master of
        keeps = parallel_options.precision == "bf16" and ranks.is_main
        frozen = {name: p for name, p in model.named_parameters() if keeps and not p.requires_grad}
        self.frozen_values = {name: p.detach().float().cpu().clone() for name, p in frozen.items()}
        model.to(ranks.device)
        self.optimizer = _torch_optimizer(model, optimizer_options, self.experts_group)
        with redirect_stdout(io.StringIO()):  # memory reports that no log level silences
            self.deepspeed, *_ = deepspeed.initialize(
                model=_LossModule(model),
                optimizer=self.optimizer,
                config=config | applied.deepspeed,
                mpu=self.unit,
                dist_init_required=False,
            )
        after_deepspeed(model, applied, ranks.timeout_s)
        self.placements = applied.placements  # of parameters that are not their canonical ones
        self.trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.expert_names = {name for name, p in model.named_parameters() if expert_parallel.is_shared_out(p)}
        self.zero_stage: int = parallel_options.zero_stage
        # One rank has nothing to reduce: spares copying every gradient into a bucket and back.
        self.deepspeed.enable_backward_allreduce = ranks.world_size > 1 or self.zero_stage > 0

    def train_step(
        self,
        micro_batches: Sequence[Batch],
        loss_fn: Callable[[nn.Module, Batch], LossParts],
        weight_fn: Callable[[Batch], float],
        accepts: Callable[[float], bool] | None = None,
        flag: Callable[[], bool] = lambda: False,
    ) -> StepResult:
        """One optimizer step over this rank's micro batches (as many on every rank: `mesh.accumulation_steps`).

        `weight_fn` gives the sum of target weights of a micro batch before its forward; `loss_fn(module, micro_batch)`
        gives the sum of weighted losses, that same sum of weights, and statistics to add up (same names and shapes on
        every rank). A micro batch without targets must still give a loss that depends on the parameters, times zero.

        `accepts` judges the loss, alike on every rank: a batch that it refuses, or whose loss or gradient norm is not
        finite, is discarded. Without it the latter raises ParallelError on every rank. `flag` is what this rank has to
        tell the others: it costs no collective of its own.
        """
        needed = self.mesh.accumulation_steps
        if len(micro_batches) != needed:
            raise ParallelError(f"Step {self.step} got {len(micro_batches)} micro batches; it needs {needed}.")
        if not self.module.training:
            self.module.train()
        factor = learning_rate_factor(self.step, self.total_steps, self.optimizer_options)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor

        readers = self.mesh.replica_ranks  # each counts the samples that all of them read
        (weight,) = all_reduce_sum([float(sum(weight_fn(batch) for batch in micro_batches)) / readers], self.ranks)
        scale = self.mesh.data_parallel / weight if weight > 0 else 0.0  # DeepSpeed averages over data-parallel ranks
        sums = _Sums()
        for position, batch in enumerate(micro_batches, start=1):
            loss_sum, weight_sum, stats = self.deepspeed(lambda module, batch=batch: loss_fn(module, batch))
            if not loss_sum.requires_grad:
                raise ParallelError(
                    f"Step {self.step}: the loss does not depend on the parameters. Sum over the targets that count, "
                    "also when there are none, so that every rank runs the same backward pass."
                )
            self.deepspeed.backward(loss_sum * scale, scale_wrt_gas=False)
            sums.add(loss_sum, weight_sum, stats)
            if position < len(micro_batches):
                self.deepspeed.step()  # no update yet: DeepSpeed counts micro batches

        loss_total, weight_total, stats_total, flagged = sums.reduced(self.ranks, readers, flag())
        loss = loss_total / weight if weight > 0 else 0.0
        if math.isfinite(loss) and not math.isclose(weight_total, weight, rel_tol=1e-5, abs_tol=1e-6):
            raise ParallelError(f"Step {self.step}: loss_fn counted weight {weight_total}, weight_fn {weight}.")
        if accepts is None:
            self._check_finite(loss, "loss")
        discarded: Literal["", "loss", "gradient norm", "refused"] = ""
        if not math.isfinite(loss):
            discarded = "loss"
        elif accepts is not None and not accepts(loss):
            discarded = "refused"
        grad_norm = self._discard() if discarded else self._update()
        if accepts is None:
            self._check_finite(grad_norm, "gradient norm")
        if not discarded and not math.isfinite(grad_norm):
            discarded = "gradient norm"
        if not discarded:
            if "expert_load" in stats_total:
                self._balance_experts(stats_total["expert_load"].sum(1))
            self.step += 1
        rate = self.optimizer_options.learning_rate * factor
        return StepResult(loss, weight, grad_norm, rate, stats_total, discarded, flagged)

    @contextmanager
    def gathered(self) -> Iterator[nn.Module]:
        """The whole model on every rank, to evaluate with; every rank must enter it.

        Inside, ranks may run different numbers of forwards. Where ranks hold parts of the model, this is a copy that is
        made of them and dropped afterwards; else the module itself.
        """
        if self.zero_stage < 3 and not self.placements and not self.options.compile:
            with context_parallel.alone(self.module):
                yield self.module
            return
        from onetrain.parallel.whole_model import whole_model

        yield whole_model(self, self._skeleton)

    def close(self) -> None:
        """Takes DeepSpeed's hooks off the module, and leaves the process groups of tensor and context parallelism."""
        for close in self.at_close:
            close()
        if self.snapshot is not None:
            self.snapshot.close()
            self.snapshot = None
        self.deepspeed.destroy()
        if self.unit is not None:
            megatron_groups.stop()
        if self.context_group is not None:
            dist.destroy_process_group(self.context_group)
            self.context_group = None

    def _update(self) -> float:
        """Clips, steps the optimizer and returns the gradient norm before clipping; a norm not finite discards them."""
        if self.zero_stage == 0:
            norm = self._total_norm()
            grad_norm = float(norm)
            if not math.isfinite(grad_norm):
                self._discard()
                return grad_norm
            clip = self.options.gradient_clipping
            if clip > 0 and grad_norm > clip:
                nn.utils.clip_grads_with_norm_(self.trainable, clip, norm)
            self.deepspeed.step()
        else:
            self.deepspeed.step()  # skips the update when the norm is not finite
            grad_norm = float(self.deepspeed.get_global_grad_norm())
            if self.deepspeed.optimizer.overflow and math.isfinite(grad_norm):  # only for some of its parameters
                grad_norm = math.inf
        return grad_norm

    def _discard(self) -> float:
        """Drops this step's gradients and leaves all else as it was, DeepSpeed's count of micro batches included.

        Returns NaN for the norm, which is not computed. ZeRO is told that the norm is infinite: its own way of skipping
        an update.
        """
        if self.zero_stage == 0:
            self.deepspeed.zero_grad()  # torch's optimizers pass over parameters without gradient
            self.deepspeed.step()
            return math.nan
        zero, infinite = self.deepspeed.optimizer, torch.tensor(math.inf, device=self.ranks.device)
        norms: dict[str, Any] = {  # methods by which DeepSpeed's optimizers find the norm, and what these return
            "_get_norm_groups": [infinite],  # stage 3
            "scaled_global_norm": infinite,  # stages 1 and 2
            "get_grads_for_norm": ([infinite], {}),  # BF16_Optimizer, which is stage 1 in bf16
        }
        name = next((name for name in norms if hasattr(zero, name)), None)
        assert name is not None, f"another DeepSpeed: its {type(zero).__name__} has none of {', '.join(norms)}"
        norm = norms[name]
        setattr(zero, name, lambda *_: norm)
        try:
            self.deepspeed.step()
        finally:
            delattr(zero, name)
        assert zero.overflow, "DeepSpeed has updated the weights from gradients that were to be dropped"
        return math.nan

    def _total_norm(self) -> Tensor:
        """Of all gradients at ZeRO stage 0: what every rank holds counts once, ranks' own experts or parts add up."""
        if self.unit is not None:
            return tensor_parallel.grad_norm({p: _grad(p) for p in self.trainable}, self.unit)
        gradients = {parameter: _grad(parameter) for parameter in self.trainable}
        if self.experts_group is not None:
            return expert_parallel.grad_norm(gradients, self.experts_group)
        return nn.utils.get_total_norm(list(gradients.values()))

    def _balance_experts(self, load_ZE: Tensor) -> None:
        """Moves the routers' biases by the global loads of this step, alike on every rank."""
        for router, load_E in zip(routers(self.module), load_ZE, strict=True):
            bias_E = router.e_score_correction_bias
            bias_E.copy_(balanced_bias(bias_E, load_E.to(bias_E.device), router.options.bias_rate))

    def _check_finite(self, value: float, name: str) -> None:
        if not math.isfinite(value):
            raise ParallelError(
                f"Step {self.step}: the {name} is {value}; the weights were not updated. Look at this step's batch, or "
                "lower optimizer.learning_rate, and go on from the last checkpoint."
            )


class _LossModule(nn.Module):
    """What DeepSpeed wraps: it must see the loss come out of a forward pass to place its hooks."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[[nn.Module], LossParts]) -> LossParts:
        return compute(self.model)


class _Sums:
    """Loss, weight and statistics added up over micro batches."""

    def __init__(self) -> None:
        self.parts: dict[str, Tensor] = {}

    def add(self, loss_sum: Tensor, weight_sum: Tensor | float, stats: dict[str, Tensor]) -> None:
        for name, value in {"": loss_sum, "/": weight_sum, **stats}.items():
            part = torch.as_tensor(value, device=loss_sum.device).detach().double()
            self.parts[name] = self.parts[name] + part if name in self.parts else part

    def reduced(self, ranks: Ranks, readers: int, flag: bool) -> tuple[float, float, dict[str, Tensor], bool]:
        """(loss sum, weight sum, statistics) over all samples, each of which `readers` ranks have read; any flag."""
        loss_sum = self.parts[""]
        flat = torch.cat([*(part.flatten() for part in self.parts.values()), loss_sum.new_full((1,), float(flag))])
        if ranks.world_size > 1:
            dist.all_reduce(flat)
            flat /= readers
        sizes = [part.numel() for part in self.parts.values()]
        loss, weight, *stats, flagged = flat.cpu().split([*sizes, 1])
        names = list(self.parts)[2:]
        by_name = {n: s.view(self.parts[n].shape) for n, s in zip(names, stats, strict=True)}
        return float(loss), float(weight), by_name, bool(flagged > 0)


def _grad(parameter: nn.Parameter) -> Tensor:
    """The gradient; zeros for a parameter that no loss has touched, as ZeRO's flat gradients have."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy of the model whose parameters take no memory."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    return copy.deepcopy(model, memo)


def _torch_optimizer(model: nn.Module, options: OptimizerOptions, experts_group: str | None) -> torch.optim.Optimizer:
    groups = parameter_groups(model, options, experts_group)
    if options.name == "sgd":
        return torch.optim.SGD(groups, lr=options.learning_rate)
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=options.betas, eps=options.eps, fused=True)
