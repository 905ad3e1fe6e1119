"""Options of the training job: what the launcher adds to the rooms' own sections."""

from dataclasses import dataclass, field
from typing import Literal

from onetrain.cluster.kubernetes_options import KubernetesOptions
from onetrain.cluster.options import ClusterOptions
from onetrain.cluster.recovery_options import RecoveryOptions
from onetrain.data.options import BatchOptions, DataOptions
from onetrain.data.stream_options import StreamOptions
from onetrain.model.options import ConversionOptions, ModelOptions, TokenizerOptions
from onetrain.parallel.options import OptimizerOptions, ParallelOptions


@dataclass(frozen=True)
class TrainOptions:
    """The training loop."""

    steps: int = 1000  # optimizer steps in all
    threads_per_worker: int = 1  # torch threads of each rank, the same in every front end
    log_every: int = 10
    evaluate_every: int = 0  # steps between validations; 0 = only at the end
    checkpoint_every: int = 500  # steps between checkpoints; 0 = only at validations and at the end
    async_checkpoints: bool = True  # written while training goes on
    checkpoint_path: str | None = None  # folder or fsspec URL of this run's checkpoints; None = <run>/checkpoints
    keep_last: int = 2  # checkpoints kept beside the best
    keep_every: int = 0  # steps; checkpoints at multiples of it stay for good; 0 = none
    resume: Literal["auto", "never"] = "auto"  # auto: go on from the run's newest checkpoint
    warm_start: str | None = None  # checkpoint folder whose weights (not optimizer, step or cursor) start this run
    deterministic: bool = True


@dataclass(frozen=True)
class EvaluationOptions:
    """Ranking metrics by constrained beam search."""

    ks: tuple[int, ...] = (5, 10, 20)
    beam_size: int | None = 50  # None = as many beams as the catalogue has SIDs, which scores every item exactly
    batch_size: int = 256  # users per rank and forward
    mask_seen: bool = False
    best_metric: str = "recall@10"  # of validation; the best checkpoint maximises it
    max_users: int | None = None  # during training only: the first users by a fixed shuffle; None = all


@dataclass(frozen=True)
class TrackingOptions:
    """JSONL is always written; wandb on top."""

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"  # auto: online with an account, else offline
    project: str = "onetrain"
    entity: str | None = None
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class GuardOptions:
    """What to do about steps that would harm the run; both guards look at a step before the weights change."""

    not_finite: Literal["stop", "skip", "roll_back"] = "stop"  # loss or gradient norm is NaN or infinite
    spike: Literal["ignore", "stop", "skip", "roll_back"] = "ignore"
    spike_factor: float = 6.0  # a loss above the median of the last losses by so many times their usual distance to it
    spike_window: int = 100  # steps that the median is of; the guard is quiet until half of them are there
    max_skips: int = 10  # batches left out in the whole run, before it stops

    def __post_init__(self) -> None:
        if self.spike_factor <= 0 or self.spike_window < 4 or self.max_skips < 0:
            raise ValueError(
                "guards.spike_factor is above 0, guards.spike_window at least 4, guards.max_skips at least 0"
            )


@dataclass(frozen=True)
class PlanOptions:
    """What `onetrain plan` cannot know from the rest."""

    sizes: dict[str, int] = field(default_factory=dict)  # ids of every feature, where no prepared data tell
    targets_per_request: float = 5.0  # that share a context; 5 items are impressed per request in OneRec-V2
    context_fill: float = 1.0  # mean share of each pathway's length that sequences fill
    nominal_parameters: float | None = None  # in OneRec-V2's FLOP convention; None = the preset's
    device_memory_gib: float = 80.0  # of each rank
    reserve_gib: float = 2.0  # of it for the device's own context, NCCL and fragmentation (assumption)

    def __post_init__(self) -> None:
        for name in ("targets_per_request", "context_fill", "device_memory_gib"):
            if getattr(self, name) <= 0:
                raise ValueError(f"plan.{name} is {getattr(self, name)}; it is above 0")
        if self.context_fill > 1 or self.reserve_gib < 0:
            raise ValueError(
                f"plan.context_fill is {self.context_fill} and plan.reserve_gib {self.reserve_gib}; "
                "the first is at most 1, the second at least 0"
            )
        for feature, size in self.sizes.items():
            if size < 1:
                raise ValueError(f"plan.sizes gives {feature} {size}; it is at least 1")


@dataclass(frozen=True)
class RunConfig:
    """One whole job: the top level of a YAML file."""

    name: str
    storage_path: str = "runs"  # the run writes into <storage_path>/<name>
    seed: int = 0
    data: DataOptions = field(default_factory=DataOptions)
    tokenizer: TokenizerOptions = field(default_factory=TokenizerOptions)
    batch: BatchOptions = field(default_factory=BatchOptions)
    stream: StreamOptions = field(default_factory=StreamOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    parallel: ParallelOptions = field(default_factory=ParallelOptions)
    conversion: ConversionOptions = field(default_factory=ConversionOptions)
    cluster: ClusterOptions = field(default_factory=ClusterOptions)
    recovery: RecoveryOptions = field(default_factory=RecoveryOptions)
    kubernetes: KubernetesOptions = field(default_factory=KubernetesOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    guards: GuardOptions = field(default_factory=GuardOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    tracking: TrackingOptions = field(default_factory=TrackingOptions)
    plan: PlanOptions = field(default_factory=PlanOptions)
