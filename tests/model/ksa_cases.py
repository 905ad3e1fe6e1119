"""Random stacks of summary attention, and what they are held against: the same weights under one dense mask."""

import random

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from onetrain.model.ksa.layout import Layout
from onetrain.model.ksa.reference import dense_attention, visible
from onetrain.model.ksa.stack import KSABlock, KSAStack
from onetrain.model.options import KSAOptions

EPS = 1e-6
LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(any)
WINDOWS = st.one_of(st.integers(0, 6), st.just(100), st.just("full"))


def stack(options: KSAOptions, seed: int = 0) -> KSAStack:
    """A float64 stack with weights large enough that attention is far from uniform."""
    torch.manual_seed(seed)
    made = KSAStack(options, EPS).double()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3) if parameter.dim() > 1 else nn.init.uniform_(parameter, 0.5, 1.5)
    return made


def small_options(seed: int, **fixed: object) -> KSAOptions:
    """Random small sizes."""
    dice = random.Random(seed)
    drawn = {
        "width": 16,
        "heads": 4,
        "kv_groups": dice.choice([None, 1, 2]),
        "layers": tuple(dice.choice(["ksa", "ksa", "full"]) for _ in range(dice.randint(1, 3))),
        "chunk": dice.randint(1, 6),
        "summaries": dice.randint(0, 3),
        "window": dice.choice([0, 1, 2, 4, 100]),
        "blend": dice.choice([0.0, 0.3, 1.0]),
        "bypass_full": dice.random() < 0.3,
        "qk_norm": dice.random() < 0.7,
        "d_ff": 24,
    }
    return KSAOptions(**{**drawn, **fixed})


def dense_stack(module: KSAStack, x_TD: Tensor, layout: Layout) -> Tensor:
    """All rows [text; summaries] of all histories, by a dense mask in every block."""
    text = layout.n_text
    x_AD = x_TD
    if module.summary is not None:
        x_AD = torch.cat((x_TD, module.summary.weight.repeat(layout.n_summaries // layout.summaries, 1)))
    for kind, block in zip(module.options.layers, module.blocks, strict=True):
        window = "full" if kind == "full" else module.options.window
        if kind == "full" and module.options.bypass_full:
            bare = Layout.of(layout.lengths, layout.chunk, 0)
            x_AD = torch.cat((_dense_block(block, x_AD[:text], bare, window), x_AD[text:]))
        else:
            x_AD = _dense_block(block, x_AD, layout, window)
    return x_AD


def _dense_block(block: nn.Module, x_AD: Tensor, layout: Layout, window: object) -> Tensor:
    assert isinstance(block, KSABlock)
    h_AD, attention, text = block.attention_norm(x_AD), block.attention, layout.n_text
    parts = [attention.project_text(h_AD[:text], layout.position_T)]
    if layout.n_summaries:
        parts.append(attention.project_summaries(h_AD[text:], layout.position_R))
    q, k, v = (torch.cat(heads, dim=1) for heads in zip(*parts, strict=True))
    y_HAK, _ = dense_attention(q, k, v, visible(layout, window))
    x_AD = x_AD + attention.out(y_HAK.transpose(0, 1).flatten(1))
    return x_AD + block.ffn(block.ffn_norm(x_AD))
