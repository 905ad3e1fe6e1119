"""Small models with every part that checkpointing and compilation could disturb, and their training steps."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from onetrain.model.build import build
from onetrain.model.decoder import SidDecoder
from onetrain.model.inputs import Context, Events, Targets
from onetrain.model.loss import LossParts, training_loss
from onetrain.model.options import KSAOptions, ModelOptions, MoEOptions, MTPOptions, Vocabulary

EVENTS = 6
VOCABULARY = Vocabulary(codes=(13, 11, 7), features={}, pathways={"history": EVENTS})
DENSE = ModelOptions(d_model=32, n_layers=3, n_heads=2, embed_dim=8, dropout=0.2)
SPARSE = replace(DENSE, moe=MoEOptions(experts=4, shared=1, d_expert=16, first_dense=1, sequence_loss=0.1, z_loss=0.01))
MODELS = {
    "dense": DENSE,
    "sparse": SPARSE,
    "mtp": replace(DENSE, mtp=MTPOptions(enabled=True), cross_attention="projected_kv", qk_norm=True, output_gate=True),
    "encoder_decoder": replace(DENSE, architecture="encoder_decoder", encoder_layers=2, cross_attention="projected_kv"),
    "lifelong": replace(
        DENSE, ksa={"history": KSAOptions(width=16, heads=2, layers=("ksa", "full"), chunk=2, window=0)}
    ),
    "decoder_only": replace(SPARSE, architecture="decoder_only"),
}
Batch = tuple[Context, Targets]


def new_model(options: ModelOptions, dtype: torch.dtype = torch.float32) -> SidDecoder:
    """Larger weights than the initial ones, so that routers and gradients are not near a tie."""
    torch.manual_seed(0)
    model = build(options, VOCABULARY).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    return model


def random_batch(seed: int, rows: int = 4, slots: int = 2) -> Batch:
    """Uneven histories; some slots are padding."""
    g = torch.Generator().manual_seed(seed)
    codes = lambda *shape: torch.stack([torch.randint(size, shape, generator=g) for size in VOCABULARY.codes], -1)  # noqa: E731
    index_BN = torch.arange(EVENTS).repeat(rows, 1)
    length_B = torch.randint(1, EVENTS + 1, (rows,), generator=g)
    weight_BT = (torch.rand(rows, slots, generator=g) < 0.7).float()
    weight_BT[0] = 1
    context = Context({"history": Events(codes(rows, EVENTS), index_BN, length_B, {})})
    return context, Targets(codes(rows, slots), torch.full((rows, slots), EVENTS), weight_BT)


def loss_fn(module: nn.Module, batch: Batch, chunk: int | None = None, most_targets: int = 0) -> LossParts:
    assert isinstance(module, SidDecoder)
    return training_loss(module(*batch), module.options, chunk, most_targets)


def weight_fn(batch: Batch) -> float:
    return float(batch[1].weight_BT.sum())


def step(model: SidDecoder, batch: Batch, chunk: int | None = None) -> tuple[LossParts, dict[str, Tensor]]:
    """Loss and gradients of one training step whose dropout has a fixed seed."""
    model.train().zero_grad()
    torch.manual_seed(1)
    parts = loss_fn(model, batch, chunk)
    parts.loss.backward()
    return parts, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
