"""Model FLOPs: what the matrix products of the lazy decoder cost, two per multiply-add, without recomputation.

Counts what is built (heads, attention scores and context linear included), not the paper's nominal convention.
"""

from dataclasses import dataclass

from onetrain.model.options import ModelOptions, Vocabulary


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of one forward pass: per target, per target and context position, per context event."""

    target: float
    target_position: float
    event: float

    def training(self, targets: float, target_positions: float, events: float) -> float:
        """Forward and backward (three times the forward).

        Args: number of targets; sum over targets of their context positions; number of context events projected.
        """
        return 3 * (self.target * targets + self.target_position * target_positions + self.event * events)


def forward_flops(options: ModelOptions, vocabulary: Vocabulary) -> ForwardFlops:
    """FLOPs of a lazy decoder with L target tokens per target."""
    d, tokens, layers = options.d_model, vocabulary.levels, options.n_layers
    linear = 2 * (2 * d * d + 4 * d * d + 3 * d * options.ffn_width)  # cross q and out, self q k v out, SwiGLU
    self_scores = 2 * 2 * tokens * d  # dense over L x L, as computed
    heads = 2 * d * sum(vocabulary.codes)
    features = len(options.features) - ("sid" in options.features)
    features += vocabulary.levels if "sid" in options.features else 0
    return ForwardFlops(
        target=tokens * layers * (linear + self_scores) + heads,
        target_position=tokens * layers * 2 * 2 * d,
        event=2 * features * options.embed_dim * options.d_context,
    )
