"""What a forward pass of a lifelong pathway's stack keeps for its backward pass, in closed form.

Counted as in `model/activations.py`, where `state`, `element` and `norm` are explained. Attention keeps queries, keys,
values, output and log-sum-exp, never its scores: in fp32 by the blocked kernel, in the model's precision by
FlexAttention. A summary token's own chunk is attended to in fp32.

Legend: w = width of the stack, C = chunk, S = summaries per chunk, K head width.
"""

from dataclasses import dataclass

import torch

from onetrain.model.ksa.kernels import kernel_for
from onetrain.model.ksa.sizes import StackWork
from onetrain.model.options import KSAOptions

ID_BYTES = 8
WIDE_BYTES = 4  # of probabilities, routing scores and softmax statistics, at any precision


@dataclass(frozen=True)
class StackBytes:
    """Of the stack of one pathway; `work` says how many rows it has."""

    options: KSAOptions
    element: int  # bytes of weights and hidden states
    on_cpu: bool
    ranks: int = 1  # that share every history

    @property
    def norm(self) -> int:
        """What an RMSNorm keeps beside its input: on the CPU its normalised input."""
        return 1 if self.on_cpu else 0

    @property
    def state(self) -> int:
        """Bytes of an element of what a norm reads, of which the CPU makes an fp32 copy."""
        return WIDE_BYTES if self.on_cpu else self.element

    @property
    def kernel_element(self) -> int:
        """Bytes of an element of what the attention of text rows keeps."""
        kernel = kernel_for(self.options.kernel, torch.device("cpu" if self.on_cpu else "cuda"))
        return WIDE_BYTES if kernel == "blocked" else self.element

    def blocks(self, work: StackWork) -> list[float]:
        """Of every block."""
        return [self.block(work, kind == "full") for kind in self.options.layers]

    def block(self, work: StackWork, full: bool) -> float:
        """Of one block on one rank: two norms, projections, attention and FFN."""
        options, read = self.options, self._rows_read(work, full)
        bypassed, work = 0.0, work.times(1 / self.ranks)
        if full and options.bypass_full:
            bypassed, work = work.summaries, work._replace(summaries=0)
        rows = work.text + work.summaries
        normed = 2 * (((1 + self.norm) * self.state + self.element) * options.width + WIDE_BYTES)
        ffn = 4 * options.ffn_width * self.element
        out = options.width * self.element  # what the output projection reads
        kept = rows * (normed + ffn + out) + bypassed * options.width * self.element  # part of the block's input
        queries = work.text * (2 * options.width * self.kernel_element + options.heads * WIDE_BYTES)
        keys = read * 2 * self._kv_width * self.kernel_element
        return kept + self._projected(work) + queries + keys + self._own_chunks(work)

    def input(self, work: StackWork) -> float:
        """What a block keeps that computes the rest again."""
        return (work.text + work.summaries) / self.ranks * self.options.width * self.element

    def passing(self, work: StackWork) -> float:
        """What a block's backward pass has for a moment: gradients of the FFN's hidden units, or of the attention."""
        hidden = (work.text + work.summaries) / self.ranks * 4 * self.options.ffn_width * self.element
        keys = max(self._rows_read(work, kind == "full") for kind in self.options.layers) * 2 * self._kv_width
        return max(hidden, (2 * work.text / self.ranks * self.options.width + keys) * self.kernel_element)

    def _rows_read(self, work: StackWork, full: bool) -> float:
        """Rows whose keys and values the last of the ranks reads: its own, and from others what its rows see."""
        own, options = work.text / self.ranks, self.options
        if full:
            return work.text + (0 if self.ranks > 1 or options.bypass_full else work.summaries)
        return min(work.text, own + (options.window * options.chunk if self.ranks > 1 else 0)) + work.summaries

    @property
    def _kv_width(self) -> int:
        return self.options.groups * self.options.d_head

    def _projected(self, work: StackWork) -> float:
        """QK-norms, and the sines and cosines of queries and keys."""
        options = self.options
        kinds = 2 if 0 < options.blend < 1 else 1  # of projections that summary tokens pass through
        norms = (1 + self.norm) * self.state * (options.width + self._kv_width)
        norms += WIDE_BYTES * (options.heads + options.groups)
        angles = 2 * options.d_head * WIDE_BYTES
        rows = work.text + kinds * work.summaries
        return options.qk_norm * rows * norms + (work.text + work.summaries) * angles

    def _own_chunks(self, work: StackWork) -> float:
        """Of the attention of summary rows: queries, gathered keys and values, probabilities, row numbers.

        In fp32 the summaries' own keys are those that the attention of text rows keeps; values of several groups lie
        head by head in neither.
        """
        options = self.options
        if options.summaries == 0:
            return 0.0
        chunks, keys = work.summaries / options.summaries, options.chunk + options.summaries
        scores = work.summaries * (options.width + options.heads * keys)
        copied: float = keys
        if self.element == WIDE_BYTES:
            copied = options.chunk + (options.summaries / 2 if options.groups > 1 else 0)
        return (scores + chunks * copied * 2 * self._kv_width) * WIDE_BYTES + chunks * options.chunk * ID_BYTES
