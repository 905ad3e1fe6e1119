"""One YAML file to one validated `RunConfig`, and back.

The rooms own their options as frozen dataclasses; this file composes them. Types are strict ("3" is no whole number),
unknown keys are errors, and every problem of a file is reported at once.

In text values `${NAME}` is an environment variable, a leading `~/` is the home folder, `$$` is a dollar sign and `$~` a
tilde. Paths may be relative to the current folder; they are made absolute here, once, because Ray workers start in
another folder.
"""

import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import TypeAdapter, ValidationError

from onetrain.cluster.atomic import write_atomically
from onetrain.launcher.config_messages import Location, describe, dotted, mismatch
from onetrain.launcher.config_preset import merge_sections, with_preset
from onetrain.launcher.config_yaml import dump_yaml, parse_yaml
from onetrain.launcher.errors import ConfigError
from onetrain.launcher.options import RunConfig
from onetrain.model.presets import preset

PathOrNone = TypeVar("PathOrNone", str, str | None)
METRICS = ("recall", "ndcg", "hr", "mrr")
_VARIABLE = re.compile(r"\$(?:(?P<literal>[$~])|\{(?P<name>[^}]*)\})")


def load_config(
    path: str | Path, overrides: Sequence[str] = (), *, needs_data: bool = True, elsewhere: bool = False
) -> RunConfig:
    """Read, override, resolve and validate a configuration.

    Args:
        path: a YAML file.
        overrides: `a.b=value` each, the value in YAML; they win over the file, the last over the first.
        needs_data: whether data.prepared must be named.
        elsewhere: the job will run on other machines, so that relative paths of a run are refused.

    Raises:
        ConfigError: one line for every problem.
    """
    problems: list[str] = []
    tree = _resolve(_read_extended(Path(path), ()), (), problems)

    def override_all(tree: dict[str, Any]) -> None:
        for override in overrides:
            _set(tree, override, problems)

    config = _validate(with_preset(tree, override_all, problems), problems)
    problems = list(dict.fromkeys(problems))  # the overrides were read twice
    if config is None or problems:
        _refuse(str(path), problems)
    given, config = config, _with_absolute_paths(config)
    if elsewhere and (relative := [*_relative_paths(given, config)]):
        _refuse(str(path), relative)
    check(config, str(path), needs_data=needs_data)
    return config


def check(config: RunConfig, source: str = "configuration", *, needs_data: bool = True) -> None:
    """Checks that concern several sections, and the ranges of the launcher's own keys.

    Raises:
        ConfigError: one line for every problem.
    """
    problems = list(_problems(config, needs_data))
    if problems:
        _refuse(source, problems)


def save_config(config: RunConfig, path: str | Path) -> None:
    """Write the resolved YAML, atomically; `load_config` reads it back equal."""
    write_atomically(Path(path), config_text(config))


def config_text(config: RunConfig) -> str:
    """The resolved configuration as YAML, which `load_config` reads back equal."""
    return dump_yaml(_escape(asdict(config)))


def config_difference(first: RunConfig, second: RunConfig) -> list[tuple[str, Any, Any]]:
    """The keys that differ: (dotted key, value in `first`, value in `second`), None where absent, sorted by key."""
    left, right = dict(_leaves(asdict(first))), dict(_leaves(asdict(second)))
    keys = sorted(left.keys() | right.keys(), key=dotted)
    return [(dotted(key), left.get(key), right.get(key)) for key in keys if left.get(key) != right.get(key)]


def run_folder(config: RunConfig) -> Path:
    """Where a run writes: <storage_path>/<name>."""
    return Path(config.storage_path) / config.name


def _read_extended(path: Path, extended_by: tuple[Path, ...]) -> dict[str, Any]:
    """The file's tree over that of the file that its key `extends` names, relative to its own folder."""
    if path.resolve() in extended_by:
        raise ConfigError(f"{path}: extends itself, through {' <- '.join(map(str, extended_by))}")
    tree = _read(path)
    base = tree.pop("extends", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ConfigError(f"{path}: extends is {base!r}; it names one YAML file, relative to this one")
    return merge_sections(_read_extended(path.parent / base, (*extended_by, path.resolve())), tree, RunConfig)


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file (current folder: {Path.cwd()})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a UTF-8 text file: {error}") from error
    tree = parse_yaml(text, str(path))
    if tree is None:
        raise ConfigError(f"{path}: is empty; the least configuration is `name: my-run` and a `data:` section")
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: the top level is not a mapping; write `key: value` lines, such as `name: my-run`")
    return tree


def _set(tree: dict[str, Any], override: str, problems: list[str]) -> None:
    """Put one `a.b=value` into the tree, in place; whether the key exists is seen by the validation."""
    key, equals, text = override.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(path):
        raise ConfigError(f"--set {override}: write it as key=value, for example --set train.steps=100")
    value = _resolve(parse_yaml(text, f"--set {override}"), path, problems)
    *sections, last = path
    for depth, section in enumerate(sections, 1):
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"--set {override}: {dotted(path[:depth])} is a value, not a section")
    tree[last] = value


def _resolve(value: Any, location: Location, problems: list[str]) -> Any:
    """Copy of a YAML value with variables and home folder filled in; notes what JSON could not carry."""
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                problems.append(f'{dotted(location) or "top level"}: the key {key!r} is not text; write "{key}"')
        return {str(key): _resolve(inner, (*location, str(key)), problems) for key, inner in value.items()}
    if isinstance(value, list):
        return [_resolve(inner, (*location, index), problems) for index, inner in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        problems.append(f"{dotted(location)}: given {value}, expected a finite number")
        return 0.0
    if not isinstance(value, str):
        return value

    def fill(match: re.Match[str]) -> str:
        if match["literal"]:
            return match["literal"]
        if match["name"] not in os.environ:
            problems.append(
                f"{dotted(location)}: the environment variable {match['name']!r} is not set; "
                "export it (a literal dollar sign is written $$)"
            )
        return os.environ.get(match["name"], "")

    home = os.path.expanduser("~") if value == "~" or value.startswith("~/") else ""
    return home + _VARIABLE.sub(fill, value[1:] if home else value)


def _escape(value: Any) -> Any:
    """The inverse of `_resolve`: text that would be filled in again is protected."""
    if isinstance(value, dict):
        return {key: _escape(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_escape(inner) for inner in value]
    if not isinstance(value, str):
        return value
    text = value.replace("$", "$$")
    return "$" + text if text.startswith("~") else text


def _validate(tree: dict[str, Any], problems: list[str]) -> RunConfig | None:
    """The tree as a `RunConfig`, None with the reasons added to `problems`.

    Through JSON, because only there does pydantic's strict mode take a list for a tuple and a mapping for a section.
    """
    try:
        config = _adapter().validate_json(json.dumps(tree), strict=True, extra="forbid")
    except ValidationError as error:
        problems.extend(describe(detail) for detail in error.errors(include_url=False))
        return None
    values = dict(_leaves(asdict(config)))
    for location, value in _leaves(tree):  # a Literal of numbers lets true and 1.0 pass for 1
        if type(values.get(location)) is int and type(value) is not int:
            problems.append(mismatch(location, value))
    return config


@cache
def _adapter() -> TypeAdapter[RunConfig]:
    return TypeAdapter(RunConfig)


def _leaves(value: Any, location: Location = ()) -> Iterator[tuple[Location, Any]]:
    """(location, value) of everything that is not a mapping; an empty mapping counts as a value."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, (*location, key))
    else:
        yield location, value


def _with_absolute_paths(config: RunConfig) -> RunConfig:
    source = config.data.source
    source = replace(
        source, events=_absolute(source.events), items=_absolute(source.items), users=_absolute(source.users)
    )
    mixture = {name: replace(part, prepared=_absolute(part.prepared)) for name, part in config.stream.mixture.items()}
    return replace(
        config,
        storage_path=_absolute(config.storage_path),
        stream=replace(config.stream, cache=_absolute(config.stream.cache), mixture=mixture),
        data=replace(config.data, prepared=_absolute(config.data.prepared), source=source),
        tokenizer=replace(config.tokenizer, array=_absolute(config.tokenizer.array)),
        train=replace(
            config.train,
            warm_start=_absolute(config.train.warm_start),
            checkpoint_path=_absolute(config.train.checkpoint_path),
        ),
    )


def _relative_paths(given: RunConfig, absolute: RunConfig) -> Iterator[str]:
    """What a run on other machines cannot use: paths that mean something else there. Preparation's do not count."""
    for key, path, here in config_difference(given, absolute):
        if not key.startswith(("data.source.", "tokenizer.")):
            yield (
                f"{key}: given {path!r}, which is relative, but the job runs on other machines; give a path that is "
                f"the same on every node (a shared folder or a URL), for example --set {key}={here}"
            )


def _absolute(path: PathOrNone) -> PathOrNone:
    """Relative to the current folder; URLs (s3://...), None and the empty text stay as they are."""
    if not path or "://" in path:
        return path
    return str(Path.cwd() / path)


def _problems(config: RunConfig, needs_data: bool) -> Iterator[str]:
    """What the sections' own types and checks cannot see."""
    evaluation, train = config.evaluation, config.train
    if not re.fullmatch(r"\w[\w.=+-]*", config.name):
        yield f"name: given {config.name!r}; it names a folder: letters, digits and . = + - _, starting with no dot"
    if "://" in config.storage_path:
        yield (
            f"storage_path: given {config.storage_path!r}; runs are written to a folder that every worker can see, "
            "so mount the store and name the folder"
        )
    if needs_data and not config.data.prepared:
        yield "data.prepared: is empty; name the folder that `onetrain prepare` writes, for example prepared/my-logs"
    if config.model.preset is None and config.model.preset_scale != 1:
        yield f"model.preset_scale: given {config.model.preset_scale}, but there is no model.preset to scale"
    elif config.model.preset is not None:
        try:
            preset(config.model.preset, config.model.preset_scale)
        except ValueError as error:
            yield str(error)
    from onetrain.launcher.config_conversion import conversion_problems
    from onetrain.launcher.config_model import model_problems  # loads numpy and arrow, which `--help` does without

    yield from model_problems(config)
    yield from conversion_problems(config)
    for key, least in (
        ("steps", 1),
        ("threads_per_worker", 1),
        ("log_every", 1),
        ("evaluate_every", 0),
        ("checkpoint_every", 0),
        ("keep_last", 1),
        ("keep_every", 0),
    ):
        if getattr(train, key) < least:
            yield f"train.{key}: given {getattr(train, key)}, expected at least {least}"
    for key in ("beam_size", "batch_size", "max_users"):
        if (value := getattr(evaluation, key)) is not None and value < 1:
            yield f"evaluation.{key}: given {value}, expected at least 1"
    ks = evaluation.ks
    if not ks or min(ks) < 1 or list(ks) != sorted(set(ks)):
        yield f"evaluation.ks: given {list(ks)}, expected rising whole numbers from 1 on, for example [5, 10, 20]"
        return
    if evaluation.beam_size is not None and evaluation.beam_size < max(ks):
        yield (
            f"evaluation.beam_size: given {evaluation.beam_size}, expected at least {max(ks)}, "
            "the largest of evaluation.ks"
        )
    metric, _, k = evaluation.best_metric.partition("@")
    if metric not in METRICS or k not in map(str, ks):
        yield (
            f"evaluation.best_metric: given {evaluation.best_metric!r}, expected <metric>@<k> with metric among "
            f"{', '.join(METRICS)} and k among evaluation.ks {list(ks)}, for example {METRICS[0]}@{ks[0]}"
        )


def _refuse(source: str, problems: list[str]) -> NoReturn:
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    raise ConfigError("\n".join([f"{source}: {count}", *(f"  {problem}" for problem in problems)]))
