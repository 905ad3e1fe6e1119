"""The placement groups and actors of a pool, and how it finds them again after its own death.

Each growth is a placement group of its own, so that shrinking gives resources back. Actors are detached: they outlive
a pool that is killed. Groups are not: when the run's Ray job ends, however it ends, Ray removes them, and with them the
processes of their actors.
"""

import time
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from onetrain.data.service.builder_actor import actor_class
from onetrain.data.service.messages import NAMESPACE, builder_name

REMOVE_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Group:
    """Builders first to first + count - 1, in one placement group."""

    first: int
    count: int
    placement: PlacementGroup

    @property
    def numbers(self) -> range:
        """Of its builders."""
        return range(self.first, self.first + self.count)

    def state(self) -> str:
        """CREATED = its resources are reserved; PENDING = not yet; RESCHEDULING = lost with a node, not yet again."""
        return str(placement_group_table(self.placement).get("state"))


class Groups:
    """All groups of one run."""

    def __init__(self, run: str, cpus_per_actor: float, threads: int, folder: str) -> None:
        self._run, self._cpus, self._folder = run, cpus_per_actor, folder
        self._name = f"onetrain-data-{run}"
        self._class = actor_class(threads)
        self.groups = self._find()
        self.actors: dict[str, Any] = {}
        for group in self.groups:
            for number in group.numbers:
                self.ensure(builder_name(run, number))

    @property
    def size(self) -> int:
        """Number of builders, those that wait for resources included."""
        return sum(group.count for group in self.groups)

    def revive(self) -> None:
        """Know the actors of the groups that were found, and make those that are missing."""
        for group in self.groups:
            for number in group.numbers:
                self.ensure(builder_name(self._run, number))

    def resize(self, wanted: int) -> None:
        """Remove the newest groups, then add one for what is missing."""
        while self.size > wanted:
            self.remove(self.groups[-1])
        if self.size < wanted:
            self._add(wanted - self.size)

    def ensure(self, name: str) -> None:
        """Have a builder of this name, which belongs to one of the groups."""
        number = int(name.rsplit("-", 1)[1])
        group = next(group for group in self.groups if number in group.numbers)
        strategy = PlacementGroupSchedulingStrategy(group.placement, number - group.first)
        options = self._class.options(
            name=name,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=self._cpus,
            max_restarts=-1,
            scheduling_strategy=strategy,
        )
        self.actors[name] = options.remote(self._folder)

    def remove(self, group: Group) -> None:
        """End a group's builders and give its resources back."""
        names = [builder_name(self._run, number) for number in group.numbers]
        for name in names:
            self.actors.pop(name, None)
        self.groups.remove(group)
        end_actors(names)
        remove_placement_group(group.placement)

    def _add(self, count: int) -> None:
        first = max((group.first + group.count for group in self.groups), default=0)
        names = [builder_name(self._run, number) for number in range(first, first + count)]
        end_actors(names)  # of an earlier run whose driver was killed
        placement = placement_group(
            [{"CPU": self._cpus}] * count, strategy="SPREAD", name=f"{self._name}/{first}+{count}"
        )
        self.groups.append(Group(first, count, placement))
        for name in names:
            self.ensure(name)

    def _find(self) -> list[Group]:
        """The groups of this run that there are already."""
        found = []
        for entry in placement_group_table().values():
            name, _, numbers = entry["name"].partition("/")
            if name == self._name and entry["state"] != "REMOVED":
                first, count = map(int, numbers.split("+"))
                placement = PlacementGroup(ray.PlacementGroupID(bytes.fromhex(entry["placement_group_id"])))
                found.append(Group(first, count, placement))
        return sorted(found, key=lambda group: group.first)


def find_actor(name: str) -> Any:
    """The service's actor of this name, or None."""
    try:
        return ray.get_actor(name, NAMESPACE)
    except ValueError:
        return None


def end_actors(names: list[str]) -> None:
    """End the service's actors of these names for good, those that there are, and wait until their names are free."""
    for name in names:
        if (actor := find_actor(name)) is not None:
            ray.kill(actor, no_restart=True)
    deadline = time.monotonic() + REMOVE_TIMEOUT_S
    while any(map(find_actor, names)) and time.monotonic() < deadline:
        time.sleep(0.05)


def shortage(actors: int, cpus_per_actor: float) -> str:
    """The wanted resources beside those of the cluster, as a small table."""
    rows = {
        "one builder wants": cpus_per_actor,
        f"{actors} builders want": actors * cpus_per_actor,
        "cluster has free": ray.available_resources().get("CPU", 0.0),
        "cluster has in all": ray.cluster_resources().get("CPU", 0.0),
    }
    nodes = [node for node in ray.nodes() if node["Alive"]]
    rows |= {f"  node {node['NodeManagerAddress']}": node["Resources"].get("CPU", 0.0) for node in nodes}
    width = max(map(len, rows))
    table = "\n".join(f"  {name:{width}}{cpus:8g}" for name, cpus in rows.items())
    return f"  {'':{width}}{'CPU':>8}\n{table}"
