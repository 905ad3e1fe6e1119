"""Which weights a checkpoint may lack or have too many when it starts the next stage of a conversion to summary
attention (KSA, section 7.1): those of the summary tokens, and nothing else.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass, field

_EMBEDDING = re.compile(r"(.*\.)?stack\.summary\.weight")
_OWN = re.compile(
    r"(?P<layer>(.*\.)?stack\.blocks\.\d+\.attention\.)(summary\.(?P<linear>query|key|value)\.weight|blend)"
)


@dataclass(frozen=True)
class Bridge:
    """From the names of a checkpoint to those of a model; names that both have are not listed."""

    copies: dict[str, str] = field(default_factory=dict)  # summary projection of the model: projection of the text
    kept: frozenset[str] = frozenset()  # of the model, as initialised
    dropped: frozenset[str] = frozenset()  # of the checkpoint; right where its blends are 0
    blends: frozenset[str] = frozenset()  # of the dropped: the weights of the summary projections

    def describe(self) -> str:
        """What is not as in the checkpoint, in words; empty if nothing."""
        embeddings = sum(bool(_EMBEDDING.fullmatch(name)) for name in self.kept)
        said = [
            f"{len(self.copies)} summary projections are copies of the text projections" if self.copies else "",
            f"{embeddings} summary embedding(s) as initialised" if embeddings else "",
            f"{len(self.dropped) - len(self.blends)} summary projections, of blend 0, dropped" if self.dropped else "",
        ]
        return ", ".join(filter(None, said))


def bridge(ours: Collection[str], saved: Collection[str]) -> Bridge:
    """What may differ between the weights and buffers of a model and those of a checkpoint.

    A layer's summary projections and their blend are in both, or missing in one of them as a whole.
    """
    copies, kept, dropped = {}, [], []
    ours_only, saved_only = set(ours) - set(saved), set(saved) - set(ours)
    for name in sorted(ours_only):
        if _EMBEDDING.fullmatch(name):
            kept.append(name)
        elif (match := _OWN.fullmatch(name)) and ours_only >= _own_names(match["layer"]):
            text = f"{match['layer']}text.{match['linear']}.weight"
            if match["linear"] is None:
                kept.append(name)
            else:
                copies[name] = text
    for name in saved_only:
        if (match := _OWN.fullmatch(name)) and saved_only >= _own_names(match["layer"]):
            dropped.append(name)
    blends = frozenset(name for name in dropped if name.endswith(".blend"))
    return Bridge(copies, frozenset(kept), frozenset(dropped), blends)


def _own_names(layer: str) -> set[str]:
    """All that a layer has for its summary tokens' own projections."""
    return {f"{layer}blend", *(f"{layer}summary.{linear}.weight" for linear in ("query", "key", "value"))}
