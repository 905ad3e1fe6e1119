"""Summary attention, slow and readable: one dense mask over all text and summary rows (KSA, sections 2.4 and 3).

Written from the table of the paper, without the ranges that the fast kernels use, so that each proves the other.

Legend: A rows of [text; summaries], T text rows, R summary rows, H query heads, G KV groups, K head width.
"""

import math

import torch
from torch import Tensor

from onetrain.model.ksa.layout import Layout, Window
from onetrain.model.precision import wide

MAX_ROWS = 20_000


def visible(layout: Layout, window: Window) -> Tensor:
    """(A, A) bool: whether the row sees the column, rows and columns in the order [text; summaries].

    Raises ValueError for more than 20,000 rows: this is a reference.
    """
    text, summaries = layout.n_text, layout.n_summaries
    if text + summaries > MAX_ROWS:
        raise ValueError(f"a dense mask of {text + summaries} rows; the reference takes at most {MAX_ROWS}")
    rows = []  # history, chunk, position or slot, whether it is a summary
    for number, length in enumerate(layout.lengths):
        rows += [(number, position // layout.chunk, position, 0) for position in range(length)]
    for number, length in enumerate(layout.lengths):
        for row in range(length // layout.chunk * layout.summaries):
            rows.append((number, *divmod(row, layout.summaries), 1))
    u_A, c_A, p_A, s_A = torch.tensor(rows, dtype=torch.int64).reshape(-1, 4).unbind(1)
    same = u_A[:, None] == u_A
    behind = c_A[:, None] - c_A
    summary_query, summary_key = s_A[:, None] == 1, s_A == 1
    if window == "full":
        text_text, text_summary = p_A <= p_A[:, None], torch.zeros_like(same)
    else:
        text_text, text_summary = (p_A <= p_A[:, None]) & (behind <= window), behind > window
    summary_text = behind == 0
    summary_summary = (behind == 0) & (p_A <= p_A[:, None])
    of_text = torch.where(summary_key, text_summary, text_text)
    of_summaries = torch.where(summary_key, summary_summary, summary_text)
    return (same & torch.where(summary_query, of_summaries, of_text)).to(layout.device)


def dense_attention(q_HAK: Tensor, k_GAK: Tensor, v_GAK: Tensor, seen_AA: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of every row and its log-sum-exp, (H, A, K) and (H, A), in fp32 at least; gradients by autograd."""
    repeat = q_HAK.shape[0] // k_GAK.shape[0]
    k_HAK, v_HAK = k_GAK.repeat_interleave(repeat, 0), v_GAK.repeat_interleave(repeat, 0)
    scores_HAA = wide(q_HAK) @ wide(k_HAK).transpose(1, 2) / math.sqrt(q_HAK.shape[-1])
    scores_HAA = scores_HAA.masked_fill(~seen_AA, -math.inf)
    lse_HA = scores_HAA.logsumexp(-1)
    return (scores_HAA.softmax(-1) @ wide(v_HAK)).to(q_HAK.dtype), lse_HA
