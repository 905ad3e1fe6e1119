"""`onetrain plan`: what a configuration will cost, before anything is built: parameters, FLOPs, memory, batches.

Arithmetic only: no model, no GPU, and no data unless they are prepared already.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

from onetrain.data.features import FIXED_SIZES, NUMBER_BUCKETS, USER
from onetrain.data.manifest import FILE_NAME as MANIFEST
from onetrain.data.remote import file_exists
from onetrain.data.schema import extra_column
from onetrain.data.sids import DESCRIPTION as SIDS
from onetrain.launcher.errors import ConfigError
from onetrain.launcher.features import all_features
from onetrain.launcher.options import RunConfig
from onetrain.launcher.plan_memory import GIB, STATE, RankMemory, element_bytes, rank_memory, suggestions
from onetrain.model.activations import context_positions, kv_elements, saved_bytes
from onetrain.model.flops import forward_flops
from onetrain.model.ksa.sizes import cache_rows, stack_pairs
from onetrain.model.lifelong import read_counts
from onetrain.model.options import Vocabulary
from onetrain.model.paper_flops import PaperFigures, paper_figures
from onetrain.model.parameter_counts import ParameterCounts, parameter_counts, stacks
from onetrain.model.presets import find, preset
from onetrain.parallel.deepspeed_config import check_options
from onetrain.parallel.errors import ParallelError
from onetrain.parallel.mesh import Mesh

EXTRA_LEVEL = "extra_level"  # in plan.sizes: codes of the level that tokenizer.collisions extra_level adds


@dataclass(frozen=True)
class HistoryPlan:
    """One history of full length in a lifelong pathway; pairs and rows of one head or KV group, over all layers."""

    events: int
    text_read: int  # states that the decoder reads ...
    summaries_read: int  # ... and summaries
    pairs: int
    full_pairs: int  # with causal attention in every layer
    cache_rows: int  # that stay while the history grows
    full_cache_rows: int
    cache_bytes: float  # keys and values of all groups, in the model's precision


@dataclass(frozen=True)
class Plan:
    """Every figure of a plan; FLOPs are per target, forward."""

    name: str
    preset: str | None
    source: str  # where the vocabulary is from
    vocabulary: Vocabulary
    parameters: ParameterCounts
    nominal_parameters: float | None  # of the FLOP convention below
    flops_by_part: dict[str, float]
    positions: int  # of a full context
    histories: dict[str, HistoryPlan]  # of the lifelong pathways
    targets_per_request: float
    paper: PaperFigures | None  # OneRec-V2's convention, for a lazy decoder with shared_kv
    kv_elements: float  # of one request
    saved_by_part: dict[str, float]  # bytes of one request
    element_bytes: int
    workers: int
    zero_stage: int
    global_batch_size: int
    mesh: Mesh | None  # None where the layout cannot be
    memory: RankMemory | None
    layout: tuple[str, ...]  # what besides ZeRO that memory depends on, in words
    device_memory_gib: float
    problems: tuple[str, ...]  # what does not fit
    suggestions: tuple[str, ...]
    train_events: int | None  # of prepared data

    @property
    def forward_flops(self) -> float:
        """Per target."""
        return sum(self.flops_by_part.values())

    @property
    def training_flops(self) -> float:
        """Per target: forward and backward, three times the forward."""
        return 3 * self.forward_flops

    @property
    def saved_bytes(self) -> float:
        """Activations that one request keeps for the backward pass."""
        return sum(self.saved_by_part.values())

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, texts and mappings, for JSON."""
        derived = {
            "parameters": {
                "total": self.parameters.total,
                "active": self.parameters.active,
                "blocks": self.parameters.blocks,
                "active_blocks": self.parameters.active_blocks,
                "total_by_part": self.parameters.total_by_part,
                "active_by_part": self.parameters.active_by_part,
            },
            "forward_flops": self.forward_flops,
            "training_flops": self.training_flops,
            "saved_bytes": self.saved_bytes,
            "memory": None if self.memory is None else asdict(self.memory) | {"total": self.memory.total},
            "fits": not self.problems,
        }
        return asdict(self) | derived


def make_plan(config: RunConfig) -> Plan:
    """The plan of a configuration.

    Raises ConfigError for a feature whose size nobody says, and DataError for prepared data that are damaged. A layout
    that cannot be, and memory that does not suffice, are `problems` of the plan.
    """
    vocabulary, source, train_events = plan_vocabulary(config)
    options, per_request = config.model, config.plan.targets_per_request
    try:
        parameters = parameter_counts(options, vocabulary)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error
    positions = context_positions(options, vocabulary)
    nominal = nominal_parameters(config)
    paper = None
    if nominal is not None and options.architecture == "lazy_decoder" and options.cross_attention == "shared_kv":
        paper = paper_figures(options, nominal, positions, per_request, levels=vocabulary.levels)
    width = element_bytes(config.parallel)
    mesh, memory, problems, changes = _layout(config, vocabulary)
    return Plan(
        name=config.name,
        preset=options.preset,
        source=source,
        vocabulary=vocabulary,
        parameters=parameters,
        nominal_parameters=nominal,
        flops_by_part=_flops_per_target(config, vocabulary),
        positions=positions,
        histories=_histories(config, vocabulary),
        targets_per_request=per_request,
        paper=paper,
        kv_elements=kv_elements(options, positions, vocabulary.levels),
        saved_by_part=saved_bytes(options, vocabulary, per_request, width).parts,
        element_bytes=width,
        workers=config.cluster.workers,
        zero_stage=config.parallel.zero_stage,
        global_batch_size=config.parallel.global_batch_size,
        mesh=mesh,
        memory=memory,
        layout=_layout_in_words(config),
        device_memory_gib=config.plan.device_memory_gib,
        problems=problems,
        suggestions=changes,
        train_events=train_events,
    )


def plan_vocabulary(config: RunConfig) -> tuple[Vocabulary, str, int | None]:
    """Sizes of codes and features, where they are from, and the training events if data are prepared.

    Prepared data with SIDs win; else tokenizer.codebook and plan.sizes. Raises ConfigError for a size that is missing.
    """
    folder = config.data.prepared
    if folder and file_exists(folder, MANIFEST) and file_exists(f"{folder}/sids", SIDS):
        from onetrain.launcher.job import PreparedData

        data = PreparedData.open(config)
        return data.vocabulary(config), f"prepared data in {folder}", data.manifest.n_train_events
    lacks = "no prepared data named" if not config.data.prepared else f"no manifest and SIDs in {folder}"
    options = config.model
    sizes = FIXED_SIZES | {extra_column(name): NUMBER_BUCKETS for name in config.data.source.extra}
    if options.preset is not None:
        sizes |= find(options.preset).sizes
    sizes |= config.plan.sizes
    codes = config.tokenizer.codebook
    wanted = all_features(options) - options.hashed.keys()
    if config.tokenizer.collisions == "extra_level":
        wanted.add(EXTRA_LEVEL)  # its size is the most items that share a SID, which only the data know
        codes = (*codes, sizes.get(EXTRA_LEVEL, 1))
    missing = sorted(wanted - sizes.keys() - {USER})
    if missing:
        example = ", ".join(f"{name}: 1000" for name in missing)
        raise ConfigError(
            f"plan.sizes: {', '.join(missing)} missing ({lacks}); say how many ids each has, for example "
            f"--set 'plan.sizes={{{example}}}', or give a feature rows with model.hashed"
        )
    vocabulary = Vocabulary(
        codes=codes,
        features={**dict.fromkeys(all_features(options)), **sizes},
        pathways=config.batch.pathway_lengths,
        user_features={**dict.fromkeys(options.user_features), **sizes, USER: None},
    )
    return vocabulary, f"tokenizer.codebook and plan.sizes ({lacks})", None


def nominal_parameters(config: RunConfig) -> float | None:
    """The count in OneRec-V2's FLOP convention: plan.nominal_parameters, or what the preset's name says.

    Of experts the active ones. None where the blocks are no longer the preset's.
    """
    options = config.model
    if config.plan.nominal_parameters is not None or options.preset is None:
        return config.plan.nominal_parameters
    published = preset(options.preset)
    shape = ("architecture", "d_model", "n_layers", "n_heads", "ffn_width", "moe")
    if any(getattr(options, name) != getattr(published, name) for name in shape):
        return None
    found = find(options.preset)
    return found.active_parameters or found.nominal_parameters


def _histories(config: RunConfig, vocabulary: Vocabulary) -> dict[str, HistoryPlan]:
    found, options = {}, config.model
    for name, ksa in stacks(options, vocabulary).items():
        length = vocabulary.pathways[name] * (vocabulary.levels if options.flatten_codes else 1)
        pairs, full_pairs = stack_pairs(length, ksa)
        rows, full_rows = cache_rows(length, ksa)
        cache_bytes = rows * 2 * ksa.groups * ksa.d_head * element_bytes(config.parallel)
        read = read_counts(length, ksa)
        found[name] = HistoryPlan(vocabulary.pathways[name], *read, pairs, full_pairs, rows, full_rows, cache_bytes)
    return found


def _flops_per_target(config: RunConfig, vocabulary: Vocabulary) -> dict[str, float]:
    """Forward FLOPs by part of one request, its context shared, over its targets."""
    options, per_request = config.model, config.plan.targets_per_request
    events = {name: config.plan.context_fill * length for name, length in vocabulary.pathways.items()}
    filled = replace(vocabulary, pathways={name: round(count) for name, count in events.items()})
    samples = config.parallel.micro_batch_size or max(config.parallel.global_batch_size // config.cluster.workers, 1)
    flops = forward_flops(options, vocabulary)
    work = flops.work(
        targets=samples * per_request,
        target_positions=samples * per_request * context_positions(options, filled),
        rows=samples,
        events={name: samples * count for name, count in events.items()},
    )
    return {part: count / (samples * per_request) for part, count in flops.forward(work).items() if count}


def _layout(
    config: RunConfig, vocabulary: Vocabulary
) -> tuple[Mesh | None, RankMemory | None, tuple[str, ...], tuple[str, ...]]:
    """(mesh, memory of a rank, what does not fit, what would)."""
    try:
        mesh = check_options(config.parallel, config.cluster.workers, config.model)
        memory = rank_memory(config, vocabulary)
    except ParallelError as error:
        return None, None, (str(error),), ()
    available = config.plan.device_memory_gib
    if memory.total <= available * GIB:
        return mesh, memory, _validation_problems(config, vocabulary, memory), ()
    largest = max(memory.device, key=lambda part: memory.device[part])
    problem = (
        f"a rank needs {memory.total / GIB:.1f} GiB and has {available:g} (plan.device_memory_gib); the largest part: "
        f"{largest}, {memory.device[largest] / GIB:.1f} GiB"
    )
    found = suggestions(config, vocabulary)
    changes = tuple(f"{words}: {needed.total / GIB:.1f} GiB a rank" for words, needed in found)
    if not changes:
        problem += "; no ZeRO stage, micro batch or number of workers that was tried fits either"
    return mesh, memory, (problem,), changes


def _validation_problems(config: RunConfig, vocabulary: Vocabulary, memory: RankMemory) -> tuple[str, ...]:
    """Where ranks hold parts of the model, each makes it whole to validate, beside its training state."""
    options = config.parallel
    if options.zero_stage < 3 and options.expert_parallel == options.tensor_parallel == 1:
        return ()
    state = sum(size for part, size in memory.device.items() if part in STATE)
    needed = state + element_bytes(options) * parameter_counts(config.model, vocabulary).total
    if needed <= config.plan.device_memory_gib * GIB:
        return ()
    return (
        f"to validate, every rank makes the whole model beside its training state: {needed / GIB:.1f} GiB of "
        f"{config.plan.device_memory_gib:g} (plan.device_memory_gib); training fits, its validations do not",
    )


def _layout_in_words(config: RunConfig) -> tuple[str, ...]:
    options, words = config.parallel, []
    if options.tensor_parallel > 1:
        words.append(f"{options.tensor_parallel} ranks share every layer")
    if options.context_parallel > 1:
        words.append(f"{options.context_parallel} ranks share every history, the last of them counted")
    if options.expert_parallel > 1:
        words.append(f"{options.expert_parallel} ranks share the experts of a block, as if loads were equal")
    if options.checkpoint_blocks not in ("none", ()):
        blocks = options.checkpoint_blocks
        named = "all blocks" if blocks == "all" else f"blocks {', '.join(map(str, blocks))}"
        words.append(f"{named} recompute their activations")
    if options.loss_chunk is not None:
        words.append(f"logits of {options.loss_chunk} targets at once")
    return tuple(words)
