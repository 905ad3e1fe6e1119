"""Model FLOPs by part: what the matrix products of a network cost, two per multiply-add, without recomputation.

Counts what is built (heads, attention scores and every projection), and what real events and targets need: padding is
computed but is no model FLOP. OneRec-V2's own convention, for a comparison with its tables, is in `paper_flops.py`.

Legend: d = d_model, D = context width, L = SID levels, S = tokens per target, M = queries of a Query-Former.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from onetrain.model.ksa.sizes import StackWork, full_layers, own_projections, projections, stack_work
from onetrain.model.options import KSAOptions, ModelOptions, QueryFormerOptions, Vocabulary
from onetrain.model.parameter_counts import (
    event_width,
    is_expanded,
    item_tokens,
    projected_width,
    stacks,
    swiglu,
    time_width,
)

PARTS = ("context", "ksa", "encoder", "cross_kv", "cross", "cross_scores", "self", "ffn", "heads", "mtp", "contrastive")


@dataclass(frozen=True)
class Work:
    """What a step works on: sums over its rows (a row is a context with its targets)."""

    targets: float
    target_positions: float  # over targets: the context positions that each sees
    rows: float
    events: Mapping[str, float]  # of each pathway, in all rows
    histories: Mapping[str, StackWork]  # of each pathway with a stack of summary attention, in all rows
    positions: float  # over rows: positions that the context processor gives
    squared: float  # over rows: square of the length that an encoder or a decoder-only network attends over
    pairs: float  # over micro batches: square of their targets, which the contrastive loss compares


@dataclass(frozen=True)
class Cost:
    """FLOPs of one forward pass for each unit of work."""

    target: float = 0.0
    target_position: float = 0.0
    row: float = 0.0
    event: Mapping[str, float] = field(default_factory=dict)
    history: Mapping[str, StackWork] = field(default_factory=dict)  # of one row, pair or position of each kind
    position: float = 0.0
    squared: float = 0.0
    pair: float = 0.0

    def of(self, work: Work) -> float:
        """Forward FLOPs of that work."""
        events = sum(cost * work.events[name] for name, cost in self.event.items())
        events += sum(cost.dot(work.histories[name]) for name, cost in self.history.items())
        per_target = self.target * work.targets + self.target_position * work.target_positions
        return (
            per_target
            + self.row * work.rows
            + events
            + self.position * work.positions
            + (self.squared * work.squared + self.pair * work.pairs)
        )


@dataclass(frozen=True)
class ForwardFlops:
    """Cost of one forward pass by part.

    context: pathways, Query-Formers, user features, time MLPs. ksa: the stacks of lifelong pathways, whose attention
    counts the pairs that are seen, not those that a kernel computes and masks. cross_kv: keys and values projected from
    the context (none for shared_kv). cross: query, output and gate. mtp and contrastive: the modules themselves; the
    additional token of the contrastive loss is in cross, self and ffn.
    """

    options: ModelOptions
    levels: int
    parts: Mapping[str, Cost]

    def work(
        self,
        *,
        targets: float,
        target_positions: float,
        rows: float,
        events: Mapping[str, float],
        micro_batches: float = 1.0,
        histories: Mapping[str, StackWork] | None = None,
    ) -> Work:
        """The work of `rows` contexts with these sums over them.

        Args: number of targets; sum over targets of the context positions each sees (the static one, the queries of
        every Query-Former, what a lifelong pathway is read as, and the visible events of the others); rows; events of
        every pathway; the micro batches, over all ranks, that these targets came in; what the stacks of lifelong
        pathways work on, by default with histories of equal length. Rows and micro batches count as equally long,
        which only an encoder, decoder_only and the contrastive loss depend on.
        """
        formers = self.options.query_formers
        per_event = self.levels if self.options.flatten_codes else 1
        if histories is None:
            histories = {
                name: stack_work(round(events[name] * per_event / rows), ksa).times(rows) if rows else StackWork()
                for name, ksa in self.options.ksa.items()
            }
        positions = rows
        for name, count in events.items():
            if name in histories:
                positions += histories[name].read
            else:
                positions += rows * formers[name].queries if name in formers else count * per_event
        attended = positions
        if self.options.architecture == "decoder_only":
            attended += self.levels * targets
        squared = attended**2 / rows if rows else 0.0
        pairs = targets**2 / micro_batches if micro_batches else 0.0
        return Work(targets, target_positions, rows, events, histories, positions, squared, pairs)

    def forward(self, work: Work) -> dict[str, float]:
        """FLOPs of one forward pass by part, in the order of PARTS."""
        return {part: cost.of(work) for part, cost in self.parts.items()}

    def training(
        self,
        *,
        targets: float,
        target_positions: float,
        rows: float,
        events: Mapping[str, float],
        micro_batches: float = 1.0,
        histories: Mapping[str, StackWork] | None = None,
    ) -> float:
        """Forward and backward (three times the forward) of that work; the arguments are those of `work`."""
        work = self.work(
            targets=targets,
            target_positions=target_positions,
            rows=rows,
            events=events,
            micro_batches=micro_batches,
            histories=histories,
        )
        return 3 * sum(self.forward(work).values())


def forward_flops(options: ModelOptions, vocabulary: Vocabulary) -> ForwardFlops:
    """FLOPs of the network that `model.build` would make."""
    parts = {
        "context": _context(options, vocabulary),
        "ksa": Cost(history={name: _stack(ksa) for name, ksa in stacks(options, vocabulary).items()}),
        **(
            _decoder_only(options, vocabulary) if options.architecture == "decoder_only" else _lazy(options, vocabulary)
        ),
        "heads": Cost(target=2 * options.d_model * sum(vocabulary.codes)),
        "mtp": _mtp(options, vocabulary) if options.mtp.enabled else Cost(),
        "contrastive": _contrastive(options, vocabulary) if options.contrastive.weight > 0 else Cost(),
    }
    return ForwardFlops(options, vocabulary.levels, {part: parts.get(part, Cost()) for part in PARTS})


def target_tokens(options: ModelOptions, levels: int) -> int:
    """S: BOS and all codes but the last, which only the contrastive loss reads."""
    return levels + 1 if options.contrastive.weight > 0 else levels


def _lazy(options: ModelOptions, vocabulary: Vocabulary) -> dict[str, Cost]:
    d, layers, tokens = options.d_model, options.n_layers, target_tokens(options, vocabulary.levels)
    projected = options.cross_attention == "projected_kv"
    key_value = 2 * 2 * d * options.kv_groups * options.d_head
    encoder = _self_projections(options) + _linear(swiglu(d, options.ffn_width))
    return {
        "encoder": Cost(position=options.encoder_layers * encoder, squared=options.encoder_layers * 4 * d),
        "cross_kv": Cost(position=layers * key_value if projected else 0),
        "cross": Cost(target=tokens * layers * _cross_projections(options)),
        "cross_scores": Cost(target_position=tokens * layers * 4 * d),
        "self": Cost(target=tokens * layers * (_self_projections(options) + tokens * 4 * d)),
        "ffn": Cost(target=tokens * _ffn(options)),
    }


def _decoder_only(options: ModelOptions, vocabulary: Vocabulary) -> dict[str, Cost]:
    """Context positions and target tokens are one sequence, whose attention is computed in full."""
    self_attention, ffn, tokens = options.n_layers * _self_projections(options), _ffn(options), vocabulary.levels
    return {
        "self": Cost(
            target=tokens * self_attention, position=self_attention, squared=options.n_layers * 4 * options.d_model
        ),
        "ffn": Cost(target=tokens * ffn, position=ffn),
    }


def _context(options: ModelOptions, vocabulary: Vocabulary) -> Cost:
    width, out, d = event_width(options, vocabulary), options.d_context, options.d_model
    per_event = vocabulary.levels if options.flatten_codes else 1
    time = time_width(options)
    per_row = 0.0
    if options.user_features:
        per_row += _linear(sum(options.width_of(name) for name in options.user_features) * out + out * out)
    events, histories = {}, {}
    for name in vocabulary.pathways:
        former, inner = options.query_formers.get(name), projected_width(options, name)
        project = width * inner + (inner * inner if options.pathway_projection == "mlp" else 0)
        events[name] = per_event * _linear(project)
        if options.time_aware:
            events[name] += _linear((time + width) * width)
        if former is not None:
            events[name] += per_event * _query_former_per_event(former)
            per_row += _query_former_per_row(former) + _linear(former.queries * former.width * out)
        elif is_expanded(options, name):
            histories[name] = StackWork(read=_linear(inner * out))
    per_target = _linear((time + d) * d) if options.time_aware else 0.0
    return Cost(target=per_target, row=per_row, event=events, history=histories)


def _stack(ksa: KSAOptions) -> StackWork:
    """Of one text row, summary row and pair through all layers. Summary tokens between their own projections and the
    text's pay for both.
    """
    layers, full, w = len(ksa.layers), full_layers(ksa), ksa.width
    rest = _linear(w * w + swiglu(w, ksa.ffn_width))  # output and FFN
    with_summaries = layers - ksa.bypass_full * full
    both = own_projections(ksa) if ksa.blend < 1 else 0
    return StackWork(
        text=layers * (_linear(projections(ksa)) + rest),
        summaries=with_summaries * (_linear(projections(ksa)) + rest) + both * _linear(projections(ksa)),
        pairs=(layers - full) * 4 * w,
        full_pairs=full * 4 * w,
    )


def _mtp(options: ModelOptions, vocabulary: Vocabulary) -> Cost:
    d, levels = options.d_model, vocabulary.levels
    token = _linear(2 * d * d + swiglu(d, options.ffn_width)) + _cross_projections(options) + _self_projections(options)
    target, scores = 0.0, 0.0
    for module in range(1, levels):
        tokens = levels - module
        target += tokens * (token + (tokens + options.mtp.attend_bos) * 4 * d)
        target += _linear(d * sum(vocabulary.codes[module:]))
        scores += tokens * 4 * d
    return Cost(target=target, target_position=scores)


def _contrastive(options: ModelOptions, vocabulary: Vocabulary) -> Cost:
    d, former = options.d_model, options.contrastive.query_former
    widths = item_tokens(options, vocabulary)
    tower = _linear(sum(widths) * former.width) + len(widths) * _query_former_per_event(former)
    tower += _query_former_per_row(former) + _linear(former.queries * former.width * d + d * d)
    return Cost(target=tower, pair=2 * d)


def _query_former_per_event(former: QueryFormerOptions) -> float:
    """Key and value projections, and the scores of all queries."""
    return former.blocks * (_linear(2 * former.width**2) + 4 * former.queries * former.width)


def _query_former_per_row(former: QueryFormerOptions) -> float:
    """Query and output projections and the FFN of every query."""
    return former.queries * former.blocks * _linear(2 * former.width**2 + swiglu(former.width, former.ffn_width))


def _cross_projections(options: ModelOptions) -> float:
    return _linear((2 + options.output_gate) * options.d_model**2)


def _self_projections(options: ModelOptions) -> float:
    return _linear((4 + options.output_gate) * options.d_model**2)


def _ffn(options: ModelOptions) -> float:
    """Of one token through all layers."""
    d, moe = options.d_model, options.moe
    sparse = sum(options.is_sparse(block) for block in range(options.n_layers))
    experts = d * moe.experts + (moe.top_k + moe.shared) * swiglu(d, options.expert_width)
    return _linear((options.n_layers - sparse) * swiglu(d, options.ffn_width) + sparse * experts)


def _linear(weights: float) -> float:
    """FLOPs of one token through so many weights."""
    return 2.0 * weights
