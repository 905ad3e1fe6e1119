"""Number of parameters of a model by part, in closed form: nothing is built, whatever the size.

Legend: d = d_model, C = concatenated feature width, D = context width, L = SID levels.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from onetrain.model.features import table_rows
from onetrain.model.ksa.sizes import stack_parameters
from onetrain.model.options import KSAOptions, ModelOptions, QueryFormerOptions, Vocabulary

PARTS = ("embeddings", "context", "ksa", "encoder", "cross", "self", "ffn", "heads", "mtp", "contrastive")


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters by part. `active` leaves out the routed experts that a token does not run through.

    embeddings: every lookup table (SIDs, features, positions, summary tokens, BOS); context: pathways, Query-Formers,
    time MLPs; ksa: the layers of lifelong pathways; cross, self and ffn: the decoder's blocks with their norms; heads
    with theirs; contrastive: the item tower without tables.
    """

    total_by_part: dict[str, int]
    active_by_part: dict[str, int]

    @property
    def total(self) -> int:
        """All parameters, those of the tables too."""
        return sum(self.total_by_part.values())

    @property
    def active(self) -> int:
        """Parameters that one token uses; tables count in full."""
        return sum(self.active_by_part.values())

    @property
    def blocks(self) -> int:
        """Of the decoder's blocks alone: 18 d^2 a layer in a dense OneRec-V2, which its sizes are named after."""
        return sum(self.total_by_part[part] for part in ("cross", "self", "ffn"))

    @property
    def active_blocks(self) -> int:
        """Of `blocks` those that one token uses."""
        return sum(self.active_by_part[part] for part in ("cross", "self", "ffn"))


def parameter_counts(options: ModelOptions, vocabulary: Vocabulary) -> ParameterCounts:
    """Parameters of the network that `model.build` would make.

    Raises ValueError for a feature that the vocabulary lacks, or an unbounded one that is not hashed.
    """
    d, layers = options.d_model, options.n_layers
    decoder_only = options.architecture == "decoder_only"
    attention = self_attention(options) + d  # and its norm
    sparse = sum(options.is_sparse(block) for block in range(layers))
    dense_ffn = layers * d + (layers - sparse) * swiglu(d, options.ffn_width)
    modules = vocabulary.levels - 1 if options.mtp.enabled else 0
    total = {
        "embeddings": _embeddings(options, vocabulary),
        "context": _context(options, vocabulary),
        "ksa": sum(stack_parameters(ksa) for ksa in stacks(options, vocabulary).values()),
        "encoder": options.encoder_layers * (attention + d + swiglu(d, options.ffn_width)) + _if(_encodes(options), d),
        "cross": 0 if decoder_only else layers * (cross_attention(options) + d),
        "self": layers * attention,
        "ffn": dense_ffn + sparse * sparse_ffn(options),
        "heads": vocabulary.levels * d + d * sum(vocabulary.codes) + _head_biases(options, vocabulary),
        "mtp": modules * (2 * d + 2 * d * d + d + swiglu(d, options.ffn_width)),
        "contrastive": _contrastive(options, vocabulary) if options.contrastive.weight > 0 else 0,
    }
    active = total | {"ffn": dense_ffn + sparse * sparse_ffn(options, active=True)}
    return ParameterCounts(total, active)


def expert_parameters(options: ModelOptions, expert_parallel: int = 1) -> int:
    """Routed experts that one of `expert_parallel` ranks holds, those included that pad their number to a multiple."""
    sparse = sum(options.is_sparse(block) for block in range(options.n_layers))
    return sparse * -(-options.moe.experts // expert_parallel) * swiglu(options.d_model, options.expert_width)


def tensor_parallel_parameters(options: ModelOptions, vocabulary: Vocabulary, ranks: int, min_rows: int) -> float:
    """Parameters of a dense model that one of `ranks` ranks holds: of attention, FFNs, heads and tables of `min_rows`
    rows and more its part, everything else whole; without padding.
    """
    d, layers, codes = options.d_model, options.n_layers, vocabulary.codes
    swiglus, selves = layers + options.encoder_layers, layers + options.encoder_layers
    swiglus += (vocabulary.levels - 1) * options.mtp.enabled
    cut = swiglus * swiglu(d, options.ffn_width) + selves * (4 + options.output_gate) * d * d + d * sum(codes)
    if options.architecture != "decoder_only":
        cut += layers * (2 + options.output_gate) * d * d
        if options.cross_attention == "projected_kv" and options.kv_groups % ranks == 0:
            cut += layers * 2 * d * options.kv_groups * options.d_head
    contrastive = options.contrastive.weight > 0
    tables = [(size, d) for size in (codes if contrastive else codes[:-1])]
    for names, sizes in ((options.features, vocabulary.features), (options.user_features, vocabulary.user_features)):
        tables += [(table_rows(name, sizes, options), options.width_of(name)) for name in names if name != "sid"]
    tables += [(size, options.width_of("sid")) for size in codes if "sid" in options.features]
    cut += sum(rows * width for rows, width in tables if rows >= min_rows)
    return parameter_counts(options, vocabulary).total - cut * (1 - 1 / ranks)


def largest_parameter(options: ModelOptions, vocabulary: Vocabulary) -> int:
    """Elements of the largest single tensor: a table, a fused FFN matrix, one matrix of all experts, or a head."""
    d, codes = options.d_model, max(vocabulary.codes)
    sizes = [d * codes, options.width_of("sid") * codes, 3 * d * d]
    sizes += [ksa.width * max(ksa.width, 2 * ksa.ffn_width) for ksa in stacks(options, vocabulary).values()]
    sizes += [_tables([name], vocabulary.features, options) for name in options.features]
    sizes += [_tables([name], vocabulary.user_features, options) for name in options.user_features]
    if options.contrastive.weight > 0:
        sizes += [_tables([name], vocabulary.features, options) for name in options.contrastive.features]
        former = options.contrastive.query_former
        sizes.append(former.queries * former.width * d)
    for block in range(options.n_layers):
        if options.is_sparse(block):
            sizes.append(d * options.expert_width * max(options.moe.experts, 2 * options.moe.shared))
        else:
            sizes.append(2 * d * options.ffn_width)
    return max(sizes)


def cross_attention(options: ModelOptions) -> int:
    """Query, output, the key and value projections that only projected_kv has, gate and norms of one block."""
    d = options.d_model
    projected = options.cross_attention == "projected_kv"
    count = 2 * d * d + _if(projected, 2 * d * options.kv_groups * options.d_head) + _gate(options)
    return count + _if(options.qk_norm, (1 + projected) * options.d_head)


def self_attention(options: ModelOptions) -> int:
    """Query, key, value, output, gate and norms of one block."""
    return 4 * options.d_model**2 + _gate(options) + _if(options.qk_norm, 2 * options.d_head)


def swiglu(width: int, hidden: int) -> int:
    """Three matrices."""
    return 3 * width * hidden


def sparse_ffn(options: ModelOptions, active: bool = False) -> int:
    """Router, experts (all, or the top-k of one token) and shared experts of one block."""
    moe = options.moe
    experts = (moe.top_k if active else moe.experts) + moe.shared
    return options.d_model * moe.experts + experts * swiglu(options.d_model, options.expert_width)


def query_former(options: QueryFormerOptions) -> int:
    """Queries, the norm of what they read, and blocks."""
    w = options.width
    return options.queries * w + w + options.blocks * (4 * w * w + 2 * w + swiglu(w, options.ffn_width))


def stacks(options: ModelOptions, vocabulary: Vocabulary) -> dict[str, KSAOptions]:
    """The pathways with a stack of summary attention, in the order of the context."""
    return {name: options.ksa[name] for name in vocabulary.pathways if name in options.ksa}


def projected_width(options: ModelOptions, pathway: str) -> int:
    """Width of a pathway's events behind its projection: of what reads them, or that of the context."""
    reader = options.query_formers.get(pathway) or options.ksa.get(pathway)
    return options.d_context if reader is None else reader.width


def is_expanded(options: ModelOptions, pathway: str) -> bool:
    """Whether what has read a pathway's events is projected to the width of the context."""
    return pathway in options.query_formers or pathway in options.ksa


def event_width(options: ModelOptions, vocabulary: Vocabulary) -> int:
    """C: width of an event's concatenated features (of one code's, with flatten_codes)."""
    codes = 1 if options.flatten_codes else vocabulary.levels
    return sum(options.width_of(name) * (codes if name == "sid" else 1) for name in options.features)


def time_width(options: ModelOptions) -> int:
    """Width of the concatenated time features; 0 without time-awareness."""
    return sum(options.width_of(name) for name in options.time_features) if options.time_aware else 0


def item_tokens(options: ModelOptions, vocabulary: Vocabulary) -> list[int]:
    """Widths of the feature tokens that the item tower reads: the codes first."""
    features = options.contrastive.features
    codes = [options.width_of("sid")] * (vocabulary.levels if "sid" in features else 0)
    return codes + [options.width_of(name) for name in features if name != "sid"]


def _embeddings(options: ModelOptions, vocabulary: Vocabulary) -> int:
    d, codes = options.d_model, vocabulary.codes
    contrastive = options.contrastive.weight > 0
    sid = options.width_of("sid") * sum(codes)
    count = _if("sid" in options.features, sid) + _tables(options.features, vocabulary.features, options)
    if options.time_aware:  # of events and of BOS
        count += 2 * _tables(options.time_features, vocabulary.features, options)
    if options.user_features:
        count += _tables(options.user_features, vocabulary.user_features, options)
    else:
        count += options.d_context
    if options.position != "none":
        per_event = vocabulary.levels if options.flatten_codes else 1
        placed = sum(length for name, length in vocabulary.pathways.items() if name not in options.ksa)
        count += event_width(options, vocabulary) * per_event * placed
    count += sum(ksa.summaries * ksa.width for ksa in stacks(options, vocabulary).values())
    count += d + d * sum(codes if contrastive else codes[:-1])
    if options.scenario_bos:
        count += d * table_rows("scenario", vocabulary.features, options)
    if contrastive:
        features = options.contrastive.features
        count += _if("sid" in features, sid) + _tables(features, vocabulary.features, options)
    return count


def _context(options: ModelOptions, vocabulary: Vocabulary) -> int:
    width, out = event_width(options, vocabulary), options.d_context
    mlp = options.pathway_projection == "mlp"
    count = out  # norm of the static position
    if options.user_features:
        count += sum(options.width_of(name) for name in options.user_features) * out + out * out
    for name in vocabulary.pathways:
        former = options.query_formers.get(name)
        inner = projected_width(options, name)
        count += width * inner + _if(mlp, inner * inner) + out
        count += inner * out if is_expanded(options, name) else 0
        count += 0 if former is None else query_former(former)
    if options.time_aware:
        d, time = options.d_model, time_width(options)
        count += (time + width) * width + (time + d) * d
    if options.architecture == "lazy_decoder" and options.cross_attention == "shared_kv":
        count += out  # a gain for every column of every chunk
    return count


def _contrastive(options: ModelOptions, vocabulary: Vocabulary) -> int:
    d, former = options.d_model, options.contrastive.query_former
    tower = sum(width * former.width for width in item_tokens(options, vocabulary)) + query_former(former)
    return d + tower + former.queries * former.width * d + d * d  # the first d: norm of the state


def _tables(names: Iterable[str], sizes: Mapping[str, int | None], options: ModelOptions) -> int:
    return sum(table_rows(name, sizes, options) * options.width_of(name) for name in names if name != "sid")


def _head_biases(options: ModelOptions, vocabulary: Vocabulary) -> int:
    if not options.scenario_head_bias:
        return 0
    return table_rows("scenario", vocabulary.features, options) * sum(vocabulary.codes)


def _gate(options: ModelOptions) -> int:
    return _if(options.output_gate, options.d_model**2 + _if(options.gate_bias is not None, options.d_model))


def _encodes(options: ModelOptions) -> bool:
    return options.encoder_layers > 0


def _if(condition: bool, count: int) -> int:
    return count if condition else 0
