"""Before any GPU is taken: what would make this run fail on these nodes, looked for on every one of them at once."""

import os
import time
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from onetrain.cluster.node_agent import NodeAgents, reason_of
from onetrain.data.errors import DataError
from onetrain.data.remote import is_remote
from onetrain.data.sids import described
from onetrain.launcher.checkpoints import run_store
from onetrain.launcher.config import run_folder
from onetrain.launcher.doctor import Check, prepared_data
from onetrain.launcher.errors import ConfigError
from onetrain.launcher.options import RunConfig
from onetrain.launcher.preflight_node import UNREADABLE, Look, Seen, look, versions
from onetrain.parallel.checkpoint_store import open_checkpoint
from onetrain.parallel.errors import ParallelError

if TYPE_CHECKING:
    from onetrain.launcher.plan import Plan

ANSWER_S = 30.0  # a node that takes longer is a problem itself
CLOCK_S = 5.0  # that a node's clock may be away from this one's
GIB = 2**30
CHECKPOINTS = 2  # the one that is written, and the one that is kept until that is whole
NAMED = 5  # nodes of a finding that are named


def preflight(config: RunConfig, agents: NodeAgents) -> list[Check]:
    """Check the configuration here, and everything else on every alive node; a finding names its nodes."""
    nodes, before = agents.alive_nodes(), versions()
    with _tokens(_written(config)) as (tokens, found), ThreadPoolExecutor(1) as pool:
        what = Look(_written(config), _prepared(config), config.stream, tokens)
        looking = pool.submit(agents.run_on, nodes, look, (what,), ANSWER_S)
        plan, here = _plan(config)  # while the nodes look around
        here += [*found, *_data(config)]
        answers = looking.result()
    seen = {node_id: answer for node_id, answer in answers.items() if isinstance(answer, Seen)}
    here += [_no_answer(nodes[node_id], answers[node_id]) for node_id in nodes if node_id not in seen]
    found_there = [(check, nodes[node_id]) for node_id, answer in seen.items() for check in answer.checks]
    ours = look(replace(what, written=(), tokens=()))
    if ours.versions != before:  # somebody edits the code at this moment
        ours.versions.pop("code")
    found_there += [(check, nodes[node_id]) for node_id, answer in seen.items() for check in _against(ours, answer)]
    if plan is not None:
        needed = CHECKPOINTS * _checkpoint_bytes(config, plan)
        found_there += [(_room(answer, needed), nodes[node_id]) for node_id, answer in seen.items() if answer.free]
    found_there += _clocks({node_id: nodes[node_id] for node_id in seen}, agents)
    return [*here, *_gathered(found_there)]


def problems(checks: Iterable[Check]) -> list[str]:
    """The findings for which a run must not start, a line each."""
    return [f"{check.name}: {check.detail}. What to do: {check.fix}" for check in checks if check.state == "fail"]


def legal_world_sizes(config: RunConfig) -> tuple[int, ...]:
    """World sizes from recovery.min_workers to cluster.workers that the options and the model allow, largest first.

    Raises ConfigError where cluster.workers is none of them.
    """
    from onetrain.parallel.deepspeed_config import check_options

    wanted, options = config.cluster.workers, config.parallel
    fewest = wanted if config.recovery.min_workers is None else config.recovery.min_workers
    try:
        check_options(options, wanted, config.model)
    except ParallelError as error:
        raise ConfigError(f"cluster.workers {wanted} is no legal world size: {error}") from error
    if fewest > wanted:
        raise ConfigError(f"recovery.min_workers is {fewest}; it is at most cluster.workers ({wanted})")

    def legal(size: int) -> bool:
        try:
            check_options(options, size, config.model)
        except ParallelError:
            return False
        return True

    replica = options.tensor_parallel * options.context_parallel * options.expert_parallel
    return tuple(size for size in range(wanted, fewest - 1, -1) if size % replica == 0 and legal(size))


def _written(config: RunConfig) -> tuple[str, ...]:
    """Folders and URLs that the run writes to."""
    elsewhere = config.train.checkpoint_path
    return (str(run_folder(config)), *([elsewhere] if elsewhere else []))


def _prepared(config: RunConfig) -> tuple[str, ...]:
    sources = [source.prepared for source in config.stream.mixture.values() if source.prepared]
    return tuple(dict.fromkeys([config.data.prepared, *sources]))


@contextmanager
def _tokens(places: Iterable[str]) -> Iterator[tuple[tuple[tuple[str, str], ...], list[Check]]]:
    """A file in each local folder for the nodes to see, as (file, text); and the folders where none can be made."""
    tokens, failed = [], []
    for place in places:
        if is_remote(place):
            continue
        text = uuid.uuid4().hex
        path = Path(place) / f".preflight-{text}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            tokens.append((str(path), text))
        except OSError as error:
            fix = "change its owner, or storage_path"
            failed.append(Check(f"folder {place}", "fail", f"the supervisor cannot write there: {error}", fix))
    try:
        yield tuple(tokens), failed
    finally:
        for file, _ in tokens:
            with suppress(OSError):
                os.unlink(file)


def _plan(config: RunConfig) -> tuple["Plan | None", list[Check]]:
    """The planner's figures, and what they say about mesh and memory."""
    from onetrain.launcher.plan import make_plan  # late, because it takes seconds

    try:
        sizes = legal_world_sizes(config)
    except ConfigError as error:
        return None, [Check("mesh", "fail", str(error), "change the named options")]
    found = [_mesh(config, sizes)]
    try:
        plan = make_plan(config)
    except (ConfigError, DataError) as error:
        return None, [*found, Check("memory", "warn", f"not planned: {error}", "see `onetrain plan`")]
    return plan, [*found, *_memory(config, plan, sizes[-1])]


def _mesh(config: RunConfig, sizes: tuple[int, ...]) -> Check:
    fewest = config.recovery.min_workers
    if fewest is not None and fewest not in sizes:
        detail = f"recovery.min_workers {fewest} is no legal world size; the fewest ranks to go on with are {sizes[-1]}"
        return Check("mesh", "warn", detail, f"set recovery.min_workers to {sizes[-1]} or lower")
    return Check("mesh", "ok", f"legal world sizes: {', '.join(map(str, sizes))}")


def _memory(config: RunConfig, plan: "Plan", fewest: int) -> Iterator[Check]:
    """Whether a rank's memory suffices, on all ranks and on the fewest; of CPUs the planner knows less."""
    from onetrain.launcher.plan_memory import rank_memory

    state: Literal["warn", "fail"] = "fail" if config.cluster.gpus_per_worker else "warn"
    fix = "; ".join(plan.suggestions) or "see `onetrain plan`"
    for problem in plan.problems:
        yield Check("memory", state, problem, fix)
    if plan.problems or plan.memory is None:
        return
    smaller = replace(config, cluster=replace(config.cluster, workers=fewest))
    needed, room = rank_memory(smaller, plan.vocabulary).total / GIB, config.plan.device_memory_gib
    detail = f"a rank needs {plan.memory.total / GIB:.1f} GiB of {room:g}"
    if needed > room:
        detail += f", but {needed:.1f} GiB with only {fewest} ranks"
        yield Check("memory", "warn", detail, "raise recovery.min_workers, or change the layout")
    else:
        yield Check("memory", "ok", detail)


def _checkpoint_bytes(config: RunConfig, plan: "Plan") -> int:
    from onetrain.launcher.plan_memory import FP32, MOMENTS

    return FP32 * int(plan.parameters.total) * (1 + MOMENTS[config.optimizer.name])


def _data(config: RunConfig) -> Iterator[Check]:
    """The prepared data and SIDs as they are here, and the SIDs that the newest checkpoint was trained with."""
    for check in prepared_data(config, quick=True):
        yield replace(check, state="fail") if check.state == "warn" else check  # training needs what is missing
    yield from _checkpoint_sids(config)


def _checkpoint_sids(config: RunConfig) -> Iterator[Check]:
    """The SIDs that the checkpoint to go on from was trained with: the newest that can be read, or train.warm_start."""
    try:
        ours = described(f"{config.data.prepared}/sids", config.stream)["fingerprint"]
    except UNREADABLE:  # told above
        return
    store, where = run_store(config), "the run's checkpoints"
    names = store.names()[::-1]
    if not names and config.train.warm_start:
        store, name = open_checkpoint(config.train.warm_start, config.stream.cache)
        names, where = [name], "train.warm_start"
    unreadable = []
    for name in names:
        try:
            trained = store.header(name)["state"]["sid_fingerprint"]
        except (ParallelError, OSError, KeyError, TypeError) as error:
            unreadable.append(f"{store.where(name)} cannot be read: {error}")
            continue
        if trained != ours:
            detail = (
                f"{store.where(name)} was trained with SID map {trained}, but {config.data.prepared}/sids is {ours}"
            )
            fix = "point data.prepared to the folder that it was trained on, or train anew under another name"
            yield Check("checkpoint", "fail", detail, fix)
        elif unreadable:
            yield Check("checkpoint", "warn", f"{unreadable[0]}; {name} is used", "see `onetrain checkpoint verify`")
        else:
            yield Check("checkpoint", "ok", f"{name} was trained with these SIDs")
        return
    if unreadable:
        yield Check("checkpoint", "fail", f"none of {where} can be read: {unreadable[0]}", "see `onetrain checkpoint`")


def _no_answer(address: str, answer: Any) -> Check:
    if isinstance(answer, TimeoutError):
        fix = "look at the node and what it mounts (a file system that hangs?), or take it out of the cluster"
    else:
        fix = "install the same onetrain on every node, and see the node's logs in Ray's session folder"
    return Check(f"node {address}", "fail", f"no answer: {reason_of(answer)}", fix)


def _against(ours: Seen, theirs: Seen) -> Iterator[Check]:
    """Versions and contents of data as a node has them, beside those of this process."""
    fix = "install the same on every node (pip install -c constraints.txt), or use one container image"
    for name, version in ours.versions.items():
        other = theirs.versions.get(name, "unknown")
        if other == version:
            yield Check("versions", "ok", "those of the supervisor")
            continue
        what = f"version of {name}" if name != "code" else "code of onetrain"
        yield Check(what, _difference(name, version, other), f"{other}, the supervisor has {version}", fix)
    for folder, contents in ours.fingerprints.items():
        other = theirs.fingerprints.get(folder, contents)  # where it cannot be read, that is told
        if other != contents:
            detail = f"the node sees {other}, the supervisor {contents}"
            yield Check(f"contents of {folder}", "fail", detail, "copy the folder there again, or mount it")


def _difference(name: str, ours: str, theirs: str) -> Literal["warn", "fail"]:
    """Builds of one version (2.13.0+cpu, +cu130) and patches of one Python differ without harm, as far as known."""
    if name == "Python":
        return "warn" if ours.split(".")[:2] == theirs.split(".")[:2] else "fail"
    return "warn" if ours.partition("+")[0] == theirs.partition("+")[0] else "fail"


def _room(seen: Seen, needed: int) -> Check:
    """Free space for two checkpoints where it is least."""
    folder, free = min(seen.free.items(), key=lambda entry: entry[1])
    detail = f"{free / GIB:.2f} GiB free in {folder}, two checkpoints take {needed / GIB:.2f}"
    if free < needed:
        return Check("room for checkpoints", "fail", detail, "free some space, or change storage_path")
    return Check("room for checkpoints", "ok", detail)


def _clocks(nodes: dict[str, str], agents: NodeAgents) -> Iterator[tuple[Check, str]]:
    """Each node's clock beside ours at the middle of the request."""
    if not nodes:
        return
    asked = time.time()
    answers = agents.run_on(nodes, time.time, (), ANSWER_S)
    answered = time.time()
    for node_id, answer in answers.items():
        if not isinstance(answer, float):
            yield _no_answer(nodes[node_id], answer), nodes[node_id]
            continue
        away = answer - (asked + answered) / 2
        if abs(away) > CLOCK_S + (answered - asked) / 2:
            detail = f"{abs(away):.0f} s {'ahead of' if away > 0 else 'behind'} the supervisor's"
            yield Check("clock", "fail", detail, "set the clocks (NTP, chrony)"), nodes[node_id]
        else:
            yield Check("clock", "ok", f"within {CLOCK_S:.0f} s of the supervisor's"), nodes[node_id]


def _gathered(found: Iterable[tuple[Check, str]]) -> Iterator[Check]:
    """One finding where all nodes that were asked are well, else each that is not, by node."""
    by_name: dict[str, list[tuple[Check, str]]] = {}
    for check, address in found:
        by_name.setdefault(check.name, []).append((check, address))
    for name, checks in by_name.items():
        bad = [(check, address) for check, address in checks if check.state != "ok"]
        if not bad:
            nodes = len({address for _, address in checks})
            yield replace(checks[0][0], detail=f"{checks[0][0].detail} ({nodes} node{'s' if nodes > 1 else ''})")
        alike: dict[Check, list[str]] = {}
        for check, address in bad:
            alike.setdefault(check, []).append(address)
        for check, addresses in alike.items():
            more = f" and {len(addresses) - NAMED} more" if len(addresses) > NAMED else ""
            yield replace(check, name=f"{name} on {', '.join(addresses[:NAMED])}{more}")
