"""OneRec-V2's own arithmetic for its lazy decoder: the convention behind its Tables 2, 3 and 4.

The paper (arXiv 2508.20900) gives no formula; this one was derived from the printed figures, and gives every one of
them. It counts a nominal number of parameters for each target token, leaves the heads and the self-attention scores out
of account, and charges a target with its share of the context linear: the targets of a request share one context.
`model/flops.py` counts what is built.

Legend: N context positions, k targets that share a context, L tokens per target, e width of a feature's embedding.
"""

from dataclasses import dataclass

from onetrain.model.options import ModelOptions

BATCH = 512  # targets, in the paper's efficiency tables
TARGETS_PER_REQUEST = 5
ACTIVATION_FACTOR = 23.1  # per token, layer and unit of d_model: fitted to the published sizes, not derived


@dataclass(frozen=True)
class PaperFigures:
    """What the tables print, of one model."""

    gflops: float  # forward and backward, per target
    kv_elements: float  # of the batch
    activations: float  # elements, of the batch


def paper_figures(
    options: ModelOptions,
    nominal_parameters: float,
    context: float,
    targets_per_request: float = TARGETS_PER_REQUEST,
    batch: float = BATCH,
    levels: int = 3,
) -> PaperFigures:
    """The tables' figures for a lazy decoder whose cross-attention has no K/V projection.

    Args: `nominal_parameters` that a target token uses (for experts the active ones); `context` positions N; how many
    targets share a context; `batch` targets. The input of the context linear is L embeddings wide, one for each code.
    Raises ValueError for an architecture that the convention does not describe.
    """
    if options.architecture != "lazy_decoder" or options.cross_attention != "shared_kv":
        raise ValueError("OneRec-V2's convention describes a lazy_decoder with shared_kv cross-attention")
    shared = context / targets_per_request
    parameters = 6 * nominal_parameters * levels
    scores = 12 * levels * context * options.d_model * options.n_layers
    linear = 6 * shared * levels * options.embed_dim * options.d_context
    kv_elements = batch * shared * options.d_context
    per_token = ACTIVATION_FACTOR * options.d_model * options.n_layers
    return PaperFigures((parameters + scores + linear) / 1e9, kv_elements, batch * levels * per_token + kv_elements)
