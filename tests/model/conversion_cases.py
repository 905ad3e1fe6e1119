"""A small decoder whose lifelong pathway is converted to summary attention, and ragged inputs for it."""

from dataclasses import replace

import torch
from torch import nn

from onetrain.model.build import build
from onetrain.model.inputs import Context, Events, Targets
from onetrain.model.options import KSAOptions, ModelOptions, Vocabulary

HYBRID, FULL = ("ksa", "ksa", "full"), ("full", "full", "full")
VOCABULARY = Vocabulary(codes=(7, 5, 6), features={}, pathways={"lifelong": 30, "recent": 4})
KSA = KSAOptions(width=16, heads=2, kv_groups=1, layers=HYBRID, chunk=3, window=1, d_ff=24)
OPTIONS = ModelOptions(d_model=16, n_layers=1, n_heads=2, embed_dim=8, position="none", ksa={"lifelong": KSA})
INPUTS = tuple[Context, Targets]


def converted(**changes):
    """The options of the model with other values for its stack."""
    return replace(OPTIONS, ksa={"lifelong": replace(KSA, **changes)})


def new_model(options=OPTIONS, seed=0):
    """Weights large enough that attention is far from uniform."""
    torch.manual_seed(seed)
    model = build(options, VOCABULARY)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3) if parameter.dim() > 1 else nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def inputs(lengths, seed=0, slots=2):
    """One row per length, with uneven weights, some of them 0, but never all."""
    g = torch.Generator().manual_seed(seed)
    rows, levels = len(lengths), len(VOCABULARY.codes)

    def sids(*shape):
        return torch.stack([torch.randint(size, shape, generator=g) for size in VOCABULARY.codes], dim=-1)

    sequences = {}
    for name, longest in VOCABULARY.pathways.items():
        length_B = torch.tensor([min(length, longest) for length in lengths])
        index_BN = torch.arange(max(int(length_B.max()), 1)).expand(rows, -1)
        sequences[name] = Events(sids(*index_BN.shape), index_BN, length_B, {})
    weight_BT = torch.rand(rows, slots, generator=g) * (torch.rand(rows, slots, generator=g) < 0.7)
    weight_BT[0, 0] = 0.5
    targets = Targets(sids(rows, slots), torch.full((rows, slots), max(VOCABULARY.pathways.values())), weight_BT)
    assert targets.sid_BTL.shape[-1] == levels
    return Context(sequences), targets


def rows_of(batch: INPUTS, rows: slice) -> INPUTS:
    """Some rows of a batch, with as much padding as they had."""
    context, targets = batch
    sequences = {
        name: Events(events.sid_BNL[rows], events.index_BN[rows], events.length_B[rows], {})
        for name, events in context.sequences.items()
    }
    return Context(sequences), Targets(targets.sid_BTL[rows], targets.end_BT[rows], targets.weight_BT[rows])
