"""From full attention to summary attention: the teacher, the distillation loss and the anneal (KSA, section 7.1).

Stacks whose summary tokens have projections of their own are those that are being converted; others stay as they are.

Legend: B context rows, T text rows of all histories, M targets, C of them in one piece, L SID levels, Z layers of
summary attention, D width.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from onetrain.model.decoder import Predictions, SidDecoder
from onetrain.model.inputs import Context, Targets
from onetrain.model.ksa.attention import attentions
from onetrain.model.ksa.part import Part, Sequence
from onetrain.model.ksa.stack import KSAStack
from onetrain.model.loss import LossParts, training_loss
from onetrain.model.moe import routers
from onetrain.model.options import ConversionOptions
from onetrain.model.precision import wide

RMS_EPS = 1e-6


def converted_stacks(model: nn.Module) -> list[KSAStack]:
    """The stacks of a model that are being converted."""
    found = [module for module in model.modules() if isinstance(module, KSAStack)]
    return [stack for stack in found if stack.options.own_projections]


def freeze_all_but_summaries(model: nn.Module) -> None:
    """Leaves gradients to summary embeddings and summary projections alone; routers keep their balance as it is."""
    model.requires_grad_(False)
    for stack in converted_stacks(model):
        for module in (stack.summary, *(attention.summary for attention in attentions(stack))):
            if module is not None:
                module.requires_grad_(True)
    for router in routers(model):
        router.options = replace(router.options, bias_rate=0.0)


def set_blend(model: nn.Module, value: float) -> None:
    """Sets the weight of all summary projections against the text's; in fp32 also in a bf16 model."""
    for stack in converted_stacks(model):
        for attention in attentions(stack):
            if attention.summary is not None:
                attention.blend = torch.tensor(value, dtype=torch.float32, device=attention.blend.device)


@contextmanager
def full_attention(model: nn.Module) -> Iterator[None]:
    """The network before its conversion: inside, every layer is causal attention over text, there are no summary
    tokens, and the decoder reads the last window of each history alone.
    """
    before = [(stack, stack.options) for stack in converted_stacks(model)]
    layers = [(attention, attention.full) for stack, _ in before for attention in attentions(stack)]
    try:
        for stack, options in before:
            kinds: list[Literal["ksa", "full"]] = ["full"] * len(options.layers)
            stack.options = replace(options, layers=tuple(kinds), summaries=0)
        for attention, _ in layers:
            attention.full = True
        yield
    finally:
        for stack, options in before:
            stack.options = options
        for attention, full in layers:
            attention.full = full


def distillation_loss(
    model: SidDecoder,
    context: Context,
    targets: Targets,
    options: ConversionOptions,
    chunk: int | None = None,
    most_targets: int = 0,
) -> LossParts:
    """Weighted sums of ce * the training loss of the student + kl * KL(teacher || student) + mse * the clipped squared
    error of its attention outputs.

    The teacher is the same network under `full_attention`, without gradient. KL at temperature 1 is the mean over
    levels of each target, times its weight, like the cross-entropy. The error is a mean over a row's text tokens, over
    width and over layers of summary attention, times the sum of the row's target weights: divided by the global weight,
    as all sums are, it is the mean over targets of their rows' errors, however ranks and micro batches share the rows.
    `chunk` and `most_targets` are those of `training_loss`; the KL's logits exist in the same pieces.
    """
    with torch.no_grad(), _attention_outputs(model) as taught, full_attention(model):
        teacher = model(context, targets)
    with _attention_outputs(model) as learned:
        student = model(context, targets)
    ce, weight, stats = training_loss(student, model.options, chunk, most_targets)
    kl_M = kl_divergences(student, teacher, chunk, most_targets).mean(0)
    error_B = attention_errors(learned, taught, options)
    kl = kl_M @ student.weight_M.to(kl_M.dtype)
    mse = error_B @ targets.weight_BT.to(error_B.dtype).sum(1)
    loss = options.ce * ce + options.kl * kl + options.mse * mse
    parts = {"conversion_ce": ce.detach(), "conversion_kl": kl.detach(), "conversion_mse": mse.detach()}
    return LossParts(loss, weight, {**stats, **parts})


def kl_divergences(
    student: Predictions, teacher: Predictions, chunk: int | None = None, most_targets: int = 0
) -> Tensor:
    """KL(teacher || student) over the codes of every level, (L, M)."""
    targets = len(student.codes_ML)
    pieces = 1 if chunk is None else max(-(-max(targets, most_targets) // chunk), 1)

    def of(h_CD: Tensor, taught_CD: Tensor, level: int, request: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad():
            taught_CV = F.log_softmax(wide(teacher.tokens.logits(taught_CD, level, request)), dim=-1)
        learned_CV = F.log_softmax(wide(student.tokens.logits(h_CD, level, request)), dim=-1)
        return (taught_CV.exp() * (taught_CV - learned_CV)).sum(-1)

    request = {name: ids_M.tensor_split(pieces) for name, ids_M in student.request.items()}
    levels = []
    for level, (h_MD, taught_MD) in enumerate(zip(student.states, teacher.states, strict=True)):
        cut = enumerate(zip(h_MD.tensor_split(pieces), taught_MD.tensor_split(pieces), strict=True))
        inputs = [(*states, level, {name: ids[index] for name, ids in request.items()}) for index, states in cut]
        if chunk is None:
            levels.append(of(*inputs[0]))
        else:
            kept = [checkpoint(of, *piece, use_reentrant=False, preserve_rng_state=False) for piece in inputs]
            levels.append(torch.cat(kept))
    return torch.stack(levels)


@dataclass
class Outputs:
    """What the layers of summary attention added to text tokens: after W_O, (T, D) each, in the order of layers."""

    text_ZTD: list[Tensor] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    sequences: list[Sequence] = field(default_factory=list)


def attention_errors(learned: Outputs, taught: Outputs, options: ConversionOptions) -> Tensor:
    """(B,) the clipped squared error of every row: mean over layers, over its text tokens and over width."""
    errors = []
    of_layers = zip(learned.text_ZTD, taught.text_ZTD, learned.parts, learned.sequences, strict=True)
    for text_TD, taught_TD, part, sequence in of_layers:
        text_TD, taught_TD = wide(text_TD), wide(taught_TD)
        if options.mse_rms:
            text_TD, taught_TD = (F.rms_norm(x, x.shape[-1:], eps=RMS_EPS) for x in (text_TD, taught_TD))
        error_T = (text_TD - taught_TD).square().clamp(max=options.mse_clip).mean(-1)
        errors.append(sequence.history_sums(error_T, part) / part.layout.length_U.to(error_T.device).clamp_min(1))
    return torch.stack(errors).mean(0)


@contextmanager
def _attention_outputs(model: nn.Module) -> Iterator[Outputs]:
    """Collects the outputs of every layer of summary attention in the forward pass inside."""
    outputs = Outputs()

    def keep(module: nn.Module, inputs: tuple[Tensor, Part, Sequence], y_AD: Tensor) -> None:
        _, part, sequence = inputs
        outputs.text_ZTD.append(y_AD[: part.n_text])
        outputs.parts.append(part)
        outputs.sequences.append(sequence)

    handles = [
        attention.register_forward_hook(keep)
        for stack in converted_stacks(model)
        for attention in attentions(stack)
        if not attention.full
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
