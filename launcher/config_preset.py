"""`model.preset` in a configuration: the fields of a published size, under whatever the user says explicitly.

The file's own keys and `--set` win over the preset. A section such as `model.moe` is filled key by key; a mapping such
as `model.query_formers` counts as one value, so that one given in the file replaces the preset's.
"""

import copy
import dataclasses
import json
from collections.abc import Callable
from typing import Any, get_type_hints

from onetrain.model.options import KSAOptions, ModelOptions
from onetrain.model.presets import preset, stack_preset

Tree = dict[str, Any]


def with_preset(tree: Tree, override: Callable[[Tree], None], problems: list[str]) -> Tree:
    """A copy of the tree with the preset's fields filled in and the overrides applied.

    An override that names another preset or scale also replaces what the file took from its own: a run's saved
    configuration says every field of it explicitly.

    Args: `override` applies all of `--set` to a tree, in place. An unknown preset is added to `problems`.
    """
    wanted = copy.deepcopy(tree)
    override(wanted)
    filling = _fields(wanted, problems)
    tree = copy.deepcopy(tree)
    own = _fields(tree, [])
    if own != filling and isinstance(tree.get("model"), dict):
        tree["model"] = _without(tree["model"], own, ModelOptions)
    _leave_stack_presets(tree, wanted)
    tree = _filled(tree, filling)
    override(tree)
    tree = _filled(tree, filling)  # again: an override may have replaced a whole section
    for name, entry in _stacks(tree).items():
        _stacks(tree)[name] = {**_stack_fields(entry, name, problems), **entry}
    return tree


def _leave_stack_presets(tree: Tree, wanted: Tree) -> None:
    """Takes from the entries of model.ksa what they have of a preset that is no longer `wanted`, in place."""
    for name, entry in _stacks(tree).items():
        named = _stacks(wanted).get(name, {}).get("preset")
        if entry.get("preset") != named:
            own = _stack_fields(entry, name, [])
            _stacks(tree)[name] = _without(entry, own, KSAOptions)


def _stacks(tree: Tree) -> Tree:
    """The entries of model.ksa that are sections, to be changed in place; the others are found by the validation."""
    model = tree.get("model")
    stacks = model.get("ksa") if isinstance(model, dict) else None
    return stacks if isinstance(stacks, dict) and all(isinstance(entry, dict) for entry in stacks.values()) else {}


def _stack_fields(entry: Tree, name: str, problems: list[str]) -> Tree:
    """The fields of the preset of model.ksa.<name>; none without one."""
    if not isinstance(entry.get("preset"), str):
        return {}
    try:
        return json.loads(json.dumps(dataclasses.asdict(stack_preset(entry["preset"]))))
    except ValueError as error:
        problems.append(f"model.ksa.{name}.preset: {error}")
        return {}


def _fields(tree: Tree, problems: list[str]) -> Tree:
    """The fields of the tree's preset as JSON would hold them; none without a preset, or where a value is no preset."""
    model = tree.get("model")
    name = model.get("preset") if isinstance(model, dict) else None
    scale = model.get("preset_scale", 1.0) if isinstance(model, dict) else None
    if not isinstance(name, str) or isinstance(scale, bool) or not isinstance(scale, int | float):
        return {}  # a value of the wrong type is found by the validation
    try:
        return json.loads(json.dumps(dataclasses.asdict(preset(name, scale))))
    except ValueError as error:
        problems.append(str(error))
        return {}


def _filled(tree: Tree, filling: Tree) -> Tree:
    model = tree.get("model", {})
    if not filling or not isinstance(model, dict):
        return tree
    return {**tree, "model": merge_sections(filling, model, ModelOptions)}


def merge_sections(base: Tree, given: Tree, options: type) -> Tree:
    """`given` over `base`: sections key by key, any other value (a mapping such as `batch.pathways` too) as a whole."""
    merged = {**base, **given}
    for name, section in _sections(options).items():
        if isinstance(base.get(name), dict) and isinstance(given.get(name), dict):
            merged[name] = merge_sections(base[name], given[name], section)
    return merged


def _without(given: Tree, base: Tree, options: type) -> Tree:
    """`given` without the values that it shares with `base`."""
    sections = _sections(options)
    kept = {}
    for name, value in given.items():
        if name in sections and isinstance(value, dict) and isinstance(base.get(name), dict):
            kept[name] = _without(value, base[name], sections[name])
        elif name not in base or value != base[name]:
            kept[name] = value
    return kept


def _sections(options: type) -> dict[str, type]:
    return {
        name: annotation
        for name, annotation in get_type_hints(options).items()
        if isinstance(annotation, type) and dataclasses.is_dataclass(annotation)
    }
