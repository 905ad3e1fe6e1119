"""The YAML dialect of configuration files: the YAML 1.2 core types, and no key twice.

PyYAML follows YAML 1.1, where `1e-3` is text, `no` is false and `12:30` is 750. Here numbers, `true`, `false` and
`null` are what they look like, and everything else is text. Underscores may group digits: `2_000_000`.
"""

import re
from typing import Any

import yaml

from onetrain.launcher.errors import ConfigError

_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?$"
    r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
)
_FLOAT_STARTS = list("-+.0123456789")
_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """Safe loader with the core types; a key that comes twice in one mapping is an error."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        first_line: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in first_line:
                problem = f"the key {key.value!r} is given twice, first in line {first_line[key.value]}; keep one"
                raise yaml.composer.ComposerError(None, None, problem, key.start_mark)
            first_line[key.value] = key.start_mark.line + 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.1 or 1.2 would read as another type; lists in one line; no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    """PyYAML folds the rarer line breaks away unless they are escaped, which it does in double quotes."""
    rare = any(character in text for character in "\x85\u2028\u2029")
    return dumper.represent_scalar(_TAG + "str", text, '"' if rare else None)


_Loader.add_implicit_resolver(_TAG + "null", re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(_TAG + "bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(_TAG + "int", re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(_TAG + "float", _FLOAT, _FLOAT_STARTS)
_Loader.add_implicit_resolver(_TAG + "merge", re.compile(r"<<$"), ["<"])
_Dumper.add_implicit_resolver(_TAG + "float", _FLOAT, _FLOAT_STARTS)
_Dumper.add_representer(str, _represent_text)
for _kind in (list, tuple):
    _Dumper.add_representer(_kind, lambda dumper, data: dumper.represent_sequence(_TAG + "seq", data, flow_style=True))


def parse_yaml(text: str, source: str) -> Any:
    """Parse one YAML document.

    Args:
        text: the document.
        source: what to call it in errors, for example its path.

    Raises:
        ConfigError: bad YAML or a key given twice, with the line.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = error.problem or error.context
        raise ConfigError(f"{source}{place}: this is not valid YAML: {problem}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{source}: this is not valid YAML: {error}") from error


def dump_yaml(tree: dict[str, Any]) -> str:
    """Text of a mapping that `parse_yaml` reads back equal (tuples as lists), keys in their order."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120, default_flow_style=False)
