"""What a configuration error says: the key, what was given, what is expected, and the nearest valid key."""

import dataclasses
import difflib
import json
import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic_core import ErrorDetails

from onetrain.launcher.options import RunConfig

Location = tuple[int | str, ...]
NAMED = "<name>"


def dotted(location: Location) -> str:
    """`("model", "features", 1)` as `model.features[1]`."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def all_keys(options: type = RunConfig, prefix: Location = ()) -> Iterator[Location]:
    """Every section and key that a configuration may have, in the order of declaration.

    Sections that the user names, as those of batch.pathways, stand under NAMED.
    """
    for name, annotation in get_type_hints(options).items():
        yield (*prefix, name)
        place: Location = (*prefix, name)
        if get_origin(annotation) is dict:
            annotation, place = get_args(annotation)[1], (*place, NAMED)
        if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
            yield from all_keys(annotation, place)


def describe(error: ErrorDetails) -> str:
    """One line for one error of pydantic."""
    location, key = error["loc"], dotted(error["loc"])
    if error["type"] == "value_error":  # a __post_init__ refused; its message names the key
        message = str(error["ctx"]["error"])
        return message if message.startswith(key) else f"{key}: {message}"
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{key}: unknown key{_suggestion(location)}"
    if error["type"] in ("missing", "missing_argument"):
        return f"{key}: is missing; expected {expected(location)}"
    if not location:
        return f"the top level is {given(error['input'])}, expected {_expected(RunConfig)}"
    return mismatch(location, error["input"])


def mismatch(location: Location, value: Any) -> str:
    """One line for a value of the wrong kind."""
    return f"{dotted(location)}: given {given(value)}, expected {expected(location)}"


def given(value: Any) -> str:
    """A value of the file as its reader would name it."""
    if value is None:
        return "null"
    text = json.dumps(value, ensure_ascii=False)
    text = text if len(text) <= 60 else text[:57] + "..."
    kinds = {bool: "", str: " (text)", int: " (a whole number)", float: " (a number)", list: " (a list)"}
    return text + kinds.get(type(value), " (a mapping)")


def expected(location: Location) -> str:
    """What the key at `location` takes."""
    annotation: Any = RunConfig
    for part in location:
        annotation = _strip_optional(annotation)
        if dataclasses.is_dataclass(annotation):
            annotation = get_type_hints(annotation)[str(part)]
        elif isinstance(part, int):
            arguments = get_args(annotation)
            annotation = arguments[0] if arguments[-1] is Ellipsis else arguments[part]
        else:
            annotation = get_args(annotation)[1]
    return _expected(annotation)


def _expected(annotation: Any) -> str:
    inner = _strip_optional(annotation)
    if inner is not annotation:
        return f"{_expected(inner)}, or null"
    if dataclasses.is_dataclass(annotation):
        return f"a section with keys among {', '.join(get_type_hints(annotation))}"
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in arguments)
    if origin is tuple:
        count = "" if arguments[-1] is Ellipsis else f" of {len(arguments)}"
        return f"a list{count}, each {_expected(arguments[0])}"
    if origin is dict:
        return f"a mapping from text to {_expected(arguments[1])}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return names.get(annotation, "any value")


def _fits(pattern: Location, place: list[int | str]) -> bool:
    return len(pattern) == len(place) and all(
        known in (part, NAMED) for known, part in zip(pattern, place, strict=True)
    )


def _strip_optional(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, types.UnionType):
        return next(option for option in get_args(annotation) if option is not type(None))
    return annotation


def _suggestion(location: Location) -> str:
    """The nearest key at the same place, and the places where a key of this name exists."""
    *place, name = location
    keys = list(all_keys())
    siblings = [key[-1] for key in keys if _fits(key[:-1], place)]
    near = [dotted((*place, key)) for key in difflib.get_close_matches(str(name), map(str, siblings), n=1)]
    elsewhere = [dotted(key) for key in keys if key[-1] == name]
    if not near and not elsewhere:
        everywhere = {str(key[-1]): key for key in keys}
        elsewhere = [dotted(everywhere[key]) for key in difflib.get_close_matches(str(name), everywhere, n=1)]
    if near or elsewhere:
        return f"; did you mean {' or '.join(near + elsewhere)}?"
    return f"; the keys here are {', '.join(map(str, siblings))}"
