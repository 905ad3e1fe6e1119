"""Options of the data room: the `data:` and `batch:` sections of a configuration."""

from dataclasses import dataclass, field
from typing import Literal

Reader = Literal["amazon", "movielens", "kuairand", "columns", "simulator", "lifelong"]


@dataclass(frozen=True)
class SimulatorOptions:
    """Size of the simulated shop (data/simulate.py)."""

    users: int = 4000
    items: int = 800
    events_per_user: int = 24  # mean
    themes: int = 16
    embedding_dim: int = 32
    seed: int = 0


@dataclass(frozen=True)
class LifelongOptions:
    """Size of the simulated lifelong users' histories (data/simulate_lifelong.py)."""

    users: int = 2000
    held_out_users: int = 100  # for validation, and as many for test
    themes: int = 8
    variants: int = 8  # of every theme; each is one item
    rebuys: int = 8  # themes of the request
    themes_of: Literal["any", "recent"] = "any"  # which they are: drawn, or those that were seen last
    min_events: int = 2500  # of a history; lengths are log-uniform
    max_events: int = 8200
    min_distance: int = 2000  # events from a deciding event to the request
    max_distance: int = 8000
    item_dim: int = 32  # of embeddings, at least themes + variants
    seed: int = 0


@dataclass(frozen=True)
class SourceOptions:
    """Where the raw logs are and how their columns are called."""

    reader: Reader = "columns"
    events: str = ""  # file, folder or glob; any fsspec path
    items: str | None = None
    users: str | None = None  # file of user attributes
    columns: dict[str, str] = field(default_factory=dict)  # canonical event column -> column of the log
    item_columns: dict[str, str] = field(default_factory=dict)  # canonical item column -> column of the item file
    user_columns: dict[str, str] = field(default_factory=dict)  # id -> column of the user file
    item_features: dict[str, str] = field(default_factory=dict)  # categorical feature -> column of the item file
    user_features: dict[str, str] = field(default_factory=dict)  # categorical feature -> column of the user file
    extra: tuple[str, ...] = ()  # further numeric event columns to carry along
    behaviours: dict[str, str] = field(default_factory=dict)  # value in the log -> canonical behaviour name
    default_behaviour: str = "interact"
    default_scenario: str = "main"
    timestamp_unit: Literal["s", "ms", "us", "iso"] = "ms"
    simulator: SimulatorOptions = field(default_factory=SimulatorOptions)
    lifelong: LifelongOptions = field(default_factory=LifelongOptions)


@dataclass(frozen=True)
class SplitOptions:
    """Which events train, validate and test.

    leave_one_out: a user's last event tests, the one before validates (users of fewer than 3 events only train).
    global_time: events at or after `valid_from` validate, at or after `test_from` test (epoch milliseconds); where
    they are None, the time points below which `train_fraction` and `train_fraction + valid_fraction` of events lie.
    """

    kind: Literal["leave_one_out", "global_time"] = "leave_one_out"
    valid_from: int | None = None
    test_from: int | None = None
    train_fraction: float = 0.8
    valid_fraction: float = 0.1


@dataclass(frozen=True)
class DataOptions:
    """Raw logs to prepared shards."""

    prepared: str = ""  # folder of manifest, shards and item table
    source: SourceOptions = field(default_factory=SourceOptions)
    split: SplitOptions = field(default_factory=SplitOptions)
    min_user_events: int = 1
    duplicates: Literal["drop", "keep"] = "drop"  # exact repeats of (user, item, timestamp, behaviour)
    bad_rows: Literal["error", "drop"] = "error"  # null ids, unreadable timestamps
    shard_events: int = 2_000_000
    append_history: int = 2000  # earlier events that `onetrain append` puts before a user's new ones, as context
    memory_limit_mb: int = 1024


@dataclass(frozen=True)
class PathwayOptions:
    """One behaviour pathway: the last `length` events before a request that pass every filter."""

    length: int | None = None  # None = batch.max_context
    behaviours: tuple[str, ...] = ()  # empty = every behaviour
    scenarios: tuple[str, ...] = ()  # empty = every scenario
    min_watched: float | None = None  # least share of the duration that was watched; unknown shares never pass
    skip: int = 0  # leave out so many of the newest events that pass: a long pathway goes on where a short one ends
    # the first event's number among those that pass is a multiple: up to align - 1 of the oldest are left out.
    # None = 1, or for a pathway of model.ksa its chunk
    align: int | None = None

    def __post_init__(self) -> None:
        if self.length is not None and self.length < 1:
            raise ValueError(f"pathway length is {self.length}; it is at least 1")
        if self.skip < 0:
            raise ValueError(f"pathway skip is {self.skip}; it is at least 0")
        if self.align is not None and self.align < 1:
            raise ValueError(f"pathway align is {self.align}; it is at least 1")
        if self.min_watched is not None and self.min_watched < 0:
            raise ValueError(f"pathway min_watched is {self.min_watched}; it is at least 0")


@dataclass(frozen=True)
class BatchOptions:
    """Prepared shards to training batches."""

    max_context: int = 50  # window: the last events before a request
    request_by: Literal["event", "timestamp"] = "event"  # what one request is: one event, or all of one timestamp
    share_context: Literal["request", "user"] = "request"  # which targets share one context
    target_behaviours: tuple[str, ...] = ()  # empty = every behaviour
    behaviour_weights: dict[str, float] = field(default_factory=dict)  # loss weight; 1 where absent
    min_context: int = 1  # requests with fewer earlier events are no samples
    pathways: dict[str, PathwayOptions] = field(default_factory=lambda: {"history": PathwayOptions()})
    utc_offset_hours: float = 0.0  # of the clock that the features hour, weekday and weekend read

    def __post_init__(self) -> None:
        for name, weight in self.behaviour_weights.items():
            if weight <= 0:
                raise ValueError(
                    f"batch.behaviour_weights gives {name} weight {weight}; weights are above 0. "
                    "To leave a behaviour out, list the others in batch.target_behaviours"
                )
        if self.max_context < 1 or not 1 <= self.min_context <= self.max_context:
            raise ValueError(
                f"batch.min_context {self.min_context} and batch.max_context {self.max_context}: "
                "1 <= min_context <= max_context"
            )
        if not -12 <= self.utc_offset_hours <= 14:
            raise ValueError(f"batch.utc_offset_hours is {self.utc_offset_hours}; clocks on Earth are at -12 to 14")
        self._check_pathways()

    def _check_pathways(self) -> None:
        if not self.pathways:
            raise ValueError(
                "batch.pathways is empty; leave it out for one pathway of the last batch.max_context events"
            )
        for name in self.pathways:
            if not name.isidentifier():
                raise ValueError(f"batch.pathways: {name!r} is no name; use letters, digits and _, no digit first")
            align, length = self.pathways[name].align, self.pathway_lengths[name]
            if align is not None and align > length:
                raise ValueError(
                    f"batch.pathways.{name}: align {align} is more than its length {length}, so that it may be empty; "
                    "make the length a multiple of align"
                )
        # the windows of a user's requests end at different events: what is cut or left out differs between them
        if self.share_context == "user" and list(self.pathways.values()) != [PathwayOptions()]:
            raise ValueError(
                "batch.share_context: user needs one plain pathway, because each request has other last events; "
                "leave batch.pathways out (no length, filter or skip), or use batch.share_context request"
            )

    @property
    def pathway_lengths(self) -> dict[str, int]:
        """The most events of each pathway."""
        return {
            name: self.max_context if pathway.length is None else pathway.length
            for name, pathway in self.pathways.items()
        }
