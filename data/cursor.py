"""The cursor: all that a checkpoint keeps of the data. Ranks, builders and prefetch have no part in it."""

from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Update:
    """From this position of the global order on, a source holds the samples of its versions 0 to `version`."""

    position: int
    source: str
    version: int
    contents: str = ""  # fingerprint of these versions' samples: every process that reads them must find the same


@dataclass(frozen=True)
class Cursor:
    """How far training has come: samples consumed, over all ranks, and when each source grew."""

    position: int = 0
    updates: tuple[Update, ...] = ()

    def at(self, position: int) -> "Cursor":
        """The same order, further on."""
        return replace(self, position=position)

    def versions(self) -> dict[str, int]:
        """The newest version of every source."""
        return {update.source: update.version for update in self.updates}

    def updated(self, versions: dict[str, int], contents: dict[str, str] | None = None) -> "Cursor":
        """With the sources that have other versions now growing (or beginning) here."""
        known, of = self.versions(), contents or {}
        new = [Update(self.position, n, v, of.get(n, "")) for n, v in versions.items() if known.get(n) != v]
        return replace(self, updates=(*self.updates, *new))

    def as_json(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Cursor":
        """What `as_json` gave."""
        return cls(value["position"], tuple(Update(**update) for update in value["updates"]))
