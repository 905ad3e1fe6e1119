"""What a training forward keeps for its backward, and the context's keys and values, in closed form.

Counted are tensors that autograd saves, each once: inputs of matrix products, norms and activation functions, what the
attention kernel keeps (never its scores), and the cross-entropy's fp32 probabilities. Parameters are not. A test holds
the estimate against autograd on small models to 5 %. On CUDA an RMSNorm keeps its input; on CPU its normalised input
too, and attention masks in fp32. Dropout masks, allocator rounding and kernels' workspaces are not counted.

Legend: d = d_model, D = context width, C = concatenated feature width, P = context positions, L = SID levels.
"""

from collections.abc import Collection
from dataclasses import dataclass

from onetrain.model.flops import target_tokens
from onetrain.model.ksa.activations import ID_BYTES, WIDE_BYTES, StackBytes
from onetrain.model.ksa.sizes import StackWork, stack_work
from onetrain.model.lifelong import read_counts
from onetrain.model.options import ModelOptions, QueryFormerOptions, Vocabulary
from onetrain.model.parameter_counts import event_width, item_tokens, projected_width, stacks, time_width


@dataclass(frozen=True)
class SavedBytes:
    """Bytes that one sample (a context with its targets, sequences at full length) keeps, by part."""

    parts: dict[str, float]

    @property
    def total(self) -> float:
        """All parts."""
        return sum(self.parts.values())


def context_positions(options: ModelOptions, vocabulary: Vocabulary) -> int:
    """P of full sequences: the static position, and of every pathway its events, codes or queries, or what the decoder
    reads of its history.
    """
    per_event, positions = vocabulary.levels if options.flatten_codes else 1, 1
    for name, length in vocabulary.pathways.items():
        if name in options.query_formers:
            positions += options.query_formers[name].queries
        elif name in options.ksa:
            positions += sum(read_counts(length * per_event, options.ksa[name]))
        else:
            positions += length * per_event
    return positions


def kv_elements(options: ModelOptions, positions: float, levels: int) -> float:
    """Elements of the keys and values that one request's targets or beams share.

    shared_kv: d_context for each position; projected_kv: key and value of every block; decoder_only: those of
    self-attention, `levels` tokens of a target included.
    """
    if options.architecture == "decoder_only":
        return options.n_layers * 2 * options.d_model * (positions + levels)
    if options.cross_attention == "projected_kv":
        return options.n_layers * 2 * options.kv_groups * options.d_head * positions
    return options.d_context * positions


def saved_bytes(
    options: ModelOptions,
    vocabulary: Vocabulary,
    targets: float,
    element_bytes: int = 2,
    micro_batch_targets: float | None = None,
    on_cpu: bool = False,
    recomputed: Collection[int] = (),
    loss_in_chunks: bool = False,
    tensor_parallel: int = 1,
    context_parallel: int = 1,
) -> SavedBytes:
    """What one sample of `targets` targets keeps.

    Args: `element_bytes` of weights and hidden states (2 for bf16); `micro_batch_targets` that the contrastive loss
    compares with each other, by default the sample's own; `on_cpu` for the CPU's kernels; `recomputed` blocks keep
    their input only (numbered as the forward pass runs them: those of lifelong pathways, of the encoder, of the
    decoder); with `loss_in_chunks` no logits are kept; `tensor_parallel`
    ranks share the heads of attention, hidden units and codes, `context_parallel` ranks every history.
    """
    if micro_batch_targets is None:
        micro_batch_targets = targets
    count = _Counter(options, vocabulary, element_bytes, on_cpu, tensor_parallel, context_parallel)
    parts = {"context": count.context(), "ksa": count.stacks(recomputed)}
    head = 0.0 if loss_in_chunks else count.heads(0)
    recomputed = [index - count.stack_blocks for index in recomputed if index >= count.stack_blocks]
    kept = options.n_layers - sum(index >= options.encoder_layers for index in recomputed)
    if options.architecture == "decoder_only":
        length = count.positions + vocabulary.levels * targets
        blocks = [count.self_block(block, length) for block in range(options.n_layers)]
        parts["blocks"] = count.over_blocks(blocks, recomputed, 0, length) + count.decoder_only_states(targets)
        parts["heads"] = targets * head
        return SavedBytes(parts)
    tokens, first = target_tokens(options, vocabulary.levels), options.encoder_layers
    parts["encoder"] = count.encoder(recomputed)
    parts["cross_kv"] = count.cross_kv()
    inputs = targets * tokens * (options.n_layers - kept) * options.d_model * element_bytes
    parts["cross"] = targets * tokens * kept * count.cross() + inputs
    parts["self"] = targets * tokens * kept * count.self_attention()
    parts["ffn"] = (
        targets
        * tokens
        * sum(
            count.ffn(options.is_sparse(block)) for block in range(options.n_layers) if first + block not in recomputed
        )
    )
    parts["heads"] = targets * (tokens * options.d_model * element_bytes + head)
    parts["mtp"] = targets * count.mtp(loss_in_chunks) if options.mtp.enabled else 0.0
    contrastive = options.contrastive.weight > 0
    parts["contrastive"] = targets * count.contrastive(micro_batch_targets) if contrastive else 0.0
    return SavedBytes(parts)


def passing_bytes(
    options: ModelOptions,
    vocabulary: Vocabulary,
    rows: float,
    targets: float,
    element_bytes: int = 2,
    on_cpu: bool = False,
    recomputed: Collection[int] = (),
    loss_chunk: int | None = None,
    tensor_parallel: int = 1,
    context_parallel: int = 1,
) -> float:
    """What a micro batch of `rows` samples of `targets` targets needs for a moment of its backward pass, on top of what
    is saved: the larger of what the loss needs, and what a block does.

    The loss: two fp32 gradients of one level's logits; in chunks, a chunk's logits, probabilities and gradients, while
    a head's gradient is added up. A block: what it computes again, and the gradients of its FFN's hidden units; by then
    the heads' probabilities are gone.
    """
    count = _Counter(options, vocabulary, element_bytes, on_cpu, tensor_parallel, context_parallel)
    codes = max(vocabulary.codes) / tensor_parallel
    decoder_only = options.architecture == "decoder_only"
    length = count.positions + vocabulary.levels * targets
    tokens = rows * (length if decoder_only else targets * target_tokens(options, vocabulary.levels))
    if loss_chunk is None:
        loss, gone = rows * targets * codes * 2 * WIDE_BYTES, rows * targets * count.probabilities()
    else:
        alive = min(loss_chunk, rows * targets) * codes * (3 * WIDE_BYTES + element_bytes)
        loss, gone = alive + 2 * options.d_model * codes * element_bytes, 0.0
    blocks = [rows * passing for passing in count.stacks_passing(recomputed)]
    recomputed = [index - count.stack_blocks for index in recomputed if index >= count.stack_blocks]
    for block in range(options.n_layers):
        again = 0.0
        if options.encoder_layers + block in recomputed:
            whole = count.self_block(block, length) / length if decoder_only else count.block(block)
            again = whole - options.d_model * element_bytes
        blocks.append(tokens * (again + count.hidden_gradients(options.is_sparse(block))))
    for block in range(options.encoder_layers):
        again = count.encoder_block() - options.d_model * element_bytes if block in recomputed else 0.0
        blocks.append(rows * count.positions * (again + count.hidden_gradients(False)))
    return max(loss, max(blocks) - gone)


class _Counter:
    """Bytes per token, position or row; `norm` is what an RMSNorm keeps beside its input.

    After QK-norm the CPU's attention kernel also gives an output that the next layer must copy. `ranks` share the
    heads of attention, hidden units and codes.
    """

    def __init__(
        self,
        options: ModelOptions,
        vocabulary: Vocabulary,
        element: int,
        on_cpu: bool,
        ranks: int = 1,
        context_ranks: int = 1,
    ) -> None:
        self.options, self.vocabulary, self.element, self.ranks = options, vocabulary, element, ranks
        self.norm = 1 if on_cpu else 0
        self.state = WIDE_BYTES if on_cpu else element  # inputs of norms and attention, which the CPU copies to fp32
        self.copy = self.state if self.state > element else 0  # what it keeps beside the original
        self.mask = WIDE_BYTES if on_cpu else element
        self.positions = context_positions(options, vocabulary)
        per_event = vocabulary.levels if options.flatten_codes else 1
        self.histories: list[tuple[StackBytes, StackWork]] = [
            (StackBytes(ksa, element, on_cpu, context_ranks), stack_work(vocabulary.pathways[name] * per_event, ksa))
            for name, ksa in stacks(options, vocabulary).items()
        ]
        self.stack_blocks = sum(len(stack.options.layers) for stack, _ in self.histories)

    def stacks(self, recomputed: Collection[int]) -> float:
        """Of one row: the blocks of all lifelong pathways."""
        sizes = [(size, stack.input(work)) for stack, work in self.histories for size in stack.blocks(work)]
        return sum(entry if index in recomputed else size for index, (size, entry) in enumerate(sizes))

    def stacks_passing(self, recomputed: Collection[int]) -> list[float]:
        """Of one row: what each of those blocks has for a moment of its backward pass, on top of what is saved."""
        sizes = [(stack, work, size) for stack, work in self.histories for size in stack.blocks(work)]
        again = [
            size - stack.input(work) if index in recomputed else 0.0 for index, (stack, work, size) in enumerate(sizes)
        ]
        return [more + stack.passing(work) for more, (stack, work, _) in zip(again, sizes, strict=True)]

    def cross(self) -> float:
        """Of one token in one block: residual, its norm, query, output; mask and statistics of the attention."""
        options = self.options
        attention = self.state + self.element + self.copy + options.qk_norm * (1 + 2 * self.norm) * self.state
        width = self.normed() + (attention + 2 * options.output_gate * self.element) / self.ranks
        statistics = 1 + options.n_heads * (1 + options.qk_norm) / self.ranks
        return width * options.d_model + self.positions * self.mask + statistics * WIDE_BYTES

    def self_attention(self) -> float:
        """Of one token in one block: residual, its norm, query, key and value, output."""
        options = self.options
        attention = 3 * self.state + self.element + self.copy + options.qk_norm * (2 + 3 * self.norm) * self.state
        width = self.normed() + (attention + 2 * options.output_gate * self.element) / self.ranks
        statistics = 1 + options.n_heads * (1 + 2 * options.qk_norm) / self.ranks
        return width * options.d_model + statistics * WIDE_BYTES

    def normed(self) -> float:
        """Of one element of a residual stream: it, what its norm keeps, and the norm's output."""
        return (1 + self.norm) * self.state + self.element

    def ffn(self, sparse: bool) -> float:
        """Of one token in one block: residual, its norm, and gate, up, silu and product of every expert."""
        options, moe = self.options, self.options.moe
        residual = self.normed() * options.d_model
        if not sparse:
            return residual + 4 * options.ffn_width / self.ranks * self.element + WIDE_BYTES
        experts = moe.top_k * (3 * options.d_model + 4 * options.expert_width) + moe.shared * 4 * options.expert_width
        routing = moe.experts * WIDE_BYTES + 3 * moe.top_k * ID_BYTES
        if self.element < WIDE_BYTES:
            routing += options.d_model * WIDE_BYTES  # the router's input
        return residual + experts * self.element + routing + WIDE_BYTES

    def block(self, block: int) -> float:
        """Of one token in one block of the decoder."""
        return self.cross() + self.self_attention() + self.ffn(self.options.is_sparse(block))

    def self_block(self, block: int, length: float) -> float:
        """Of one row in one block of decoder_only, whose mask is one square."""
        return length * (self.self_attention() + self.ffn(self.options.is_sparse(block)) + length * self.mask)

    def encoder_block(self) -> float:
        """Of one position in one block of the encoder."""
        return self.self_attention() + self.ffn(sparse=False)

    def over_blocks(self, bytes_of: list[float], recomputed: Collection[int], first: int, tokens: float) -> float:
        """Blocks from index `first` on: what each keeps, or its input of `tokens` tokens where it recomputes."""
        inputs = tokens * self.options.d_model * self.element
        return sum(inputs if first + i in recomputed else size for i, size in enumerate(bytes_of))

    def hidden_gradients(self, sparse: bool) -> float:
        """Of one token: gradients of an FFN's gate, up, silu and product, which exist at once."""
        options, moe = self.options, self.options.moe
        width = options.ffn_width / self.ranks
        if sparse:
            width = max(moe.top_k, moe.shared) * options.expert_width
        return 4 * width * self.element

    def heads(self, first: int) -> float:
        """Of one target: normed states and probabilities of the levels from `first` on."""
        codes = self.vocabulary.codes[first:]
        normed = len(codes) * (self.element + self.norm * self.state + self.copy) * self.options.d_model
        return normed + (len(codes) + sum(codes) / self.ranks) * WIDE_BYTES

    def probabilities(self) -> float:
        """Of one target, of all levels and MTP modules."""
        levels = self.vocabulary.levels if self.options.mtp.enabled else 1
        return sum(sum(self.vocabulary.codes[first:]) for first in range(levels)) / self.ranks * WIDE_BYTES

    def mtp(self, loss_in_chunks: bool) -> float:
        """Of one target: fusion, the first block's attention, FFN and heads of every module."""
        d, levels, total = self.options.d_model, self.vocabulary.levels, 0.0
        for module in range(1, levels):
            tokens = levels - module
            fusion = (2 + 2 * self.norm + 1) * d * self.element  # its input, and the state that the module gives
            total += tokens * (fusion + 2 * WIDE_BYTES + self.cross() + self.self_attention() + self.ffn(sparse=False))
            total += self.options.mtp.attend_bos * 2 * (tokens + 1) * d * self.element
            total += 0.0 if loss_in_chunks else self.heads(module)
        return total

    def contrastive(self, micro_batch_targets: float) -> float:
        """Of one target: item tower, both unit vectors, and its row of scores."""
        d, former = self.options.d_model, self.options.contrastive.query_former
        widths = item_tokens(self.options, self.vocabulary)
        tower = sum(widths) + len(widths) * self._read_by(former) + former.queries * former.width + 3 * d
        vectors = (1 + self.norm) * d + 4 * d
        scores = micro_batch_targets * (WIDE_BYTES + 1)
        ids = len(self.options.contrastive.features) * ID_BYTES
        return (tower + vectors) * self.element + self._queries(former) + scores + ids

    def context(self) -> float:
        """Of one row: from feature ids to the context positions, and the norms of the key/value sets."""
        options, vocabulary = self.options, self.vocabulary
        width, out, time = event_width(options, vocabulary), options.d_context, time_width(options)
        per_event = vocabulary.levels if options.flatten_codes else 1
        mlp = options.pathway_projection == "mlp"
        ids = sum(vocabulary.levels if name == "sid" else 1 for name in options.features)
        ids += len(options.time_features) * options.time_aware
        user = sum(options.width_of(name) for name in options.user_features)
        elements, other = (1 + self.norm) * out + (user + 2 * out if user else 0), 0.0
        for name, length in vocabulary.pathways.items():
            former, inner, tokens = options.query_formers.get(name), projected_width(options, name), length * per_event
            event, normed = width + 2 * inner * mlp, tokens
            if former is not None:
                event += self._read_by(former)
                elements += former.queries * (former.width + (1 + self.norm) * out)
                other += self._queries(former) + former.blocks * tokens * self.mask
            elif name in options.ksa:
                normed = sum(read_counts(tokens, options.ksa[name]))
                other += normed * (inner * self.element + ID_BYTES) + tokens  # the mask that packs the events
            if former is None:
                other += normed * (1 + self.norm) * out * self.state
            elements += tokens * event
            if options.time_aware:
                elements += length * (time + 2 * width)
            other += length * ids * ID_BYTES + normed * WIDE_BYTES
        if options.architecture == "lazy_decoder" and options.cross_attention == "shared_kv":
            other += self.positions * (2 + self.norm) * out * self.state  # all as the norms' input, and their output
            other += self.positions * options.l_kv * options.s_kv * WIDE_BYTES
        elif options.architecture == "lazy_decoder":
            elements += self.positions * out  # input of every block's projections; else the first block counts it
        return elements * self.element + other

    def cross_kv(self) -> float:
        """Of one row: projected keys and values of every block."""
        options = self.options
        if options.cross_attention == "shared_kv":
            return 0.0
        width = 2 + options.qk_norm * (1 + self.norm)
        groups = options.kv_groups / (self.ranks if options.kv_groups % self.ranks == 0 else 1)
        per_position = groups * (width * options.d_head * self.element + options.qk_norm * WIDE_BYTES)
        return options.n_layers * self.positions * per_position

    def encoder(self, recomputed: Collection[int]) -> float:
        """Of one row: the encoder's blocks and its final norm."""
        options = self.options
        if options.encoder_layers == 0:
            return 0.0
        blocks = [self.positions * self.encoder_block()] * options.encoder_layers
        norm = self.positions * ((2 + self.norm) * options.d_model * self.element + WIDE_BYTES)
        return self.over_blocks(blocks, recomputed, 0, self.positions) + norm

    def decoder_only_states(self, targets: float) -> float:
        """Of one row: what the blocks give, and the targets' part of it."""
        tokens = self.vocabulary.levels * targets
        return (self.positions + 2 * tokens) * self.options.d_model * self.element

    def _read_by(self, former: QueryFormerOptions) -> int:
        """Elements of one position that a Query-Former reads: it, its norm, and each block's key and value."""
        return (2 + self.norm + 2 * former.blocks) * former.width

    def _queries(self, former: QueryFormerOptions) -> float:
        """Bytes of one row's queries: in each block two norms with their residuals, query, output, FFN."""
        block = (6 + 2 * self.norm) * former.width + 4 * former.ffn_width
        statistics = (2 + former.heads) * WIDE_BYTES
        return former.queries * former.blocks * (block * self.element + statistics)
