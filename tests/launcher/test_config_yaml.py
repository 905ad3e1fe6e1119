import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onetrain.launcher.config_yaml import dump_yaml, parse_yaml
from onetrain.launcher.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        ("-1.5e+3", -1500.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("2_000_000", 2_000_000),
        ("-7", -7),
        ("0", 0),
        ("true", True),
        ("null", None),
        ("~", None),
        ("", None),
        ("no", "no"),
        ("on", "on"),
        ("007", "007"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("0x10", "0x10"),
        ("1e", "1e"),
        ("e5", "e5"),
        ("'1'", "1"),
        (".inf", math.inf),
    ],
)
def test_scalars_are_what_they_look_like(text, value):
    parsed = parse_yaml(text, "here")
    assert parsed == value
    assert type(parsed) is type(value)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_text_stays_text(text):
    assert parse_yaml(dump_yaml({"key": text}), "here") == {"key": text}


@pytest.mark.parametrize("text", ["!!python/object/apply:os.getcwd []", "a: !!int x", "a: \x01", "a: b: c", "*nowhere"])
def test_errors_name_the_source(text):
    with pytest.raises(ConfigError, match=r"^here.*not valid YAML"):
        parse_yaml(text, "here")
