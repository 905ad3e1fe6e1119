"""The Python blocks of docs/data.md run as they stand, and what the benchmarks take from onetrain is there."""

import ast
import importlib
import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

from onetrain.data.options import DataOptions, SimulatorOptions, SourceOptions
from onetrain.data.prepare import prepare
from onetrain.data.sids import SidMap

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("benchmarks/**/*.py"))


def test_the_python_blocks_of_the_data_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = SourceOptions(
        reader="simulator",
        events="logs",
        item_features={"maker": "maker"},
        user_features={"age_group": "age_group"},
        simulator=SimulatorOptions(users=30, items=100),
    )
    manifest = prepare(DataOptions(prepared="prepared/shop", source=source))
    codes = np.random.default_rng(0).integers(0, 4, (manifest.items.rows, 3))
    SidMap(codes, (4, 4, 4), (), manifest.catalogue_fingerprint).save("prepared/shop/sids")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/data.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    names = {}
    for block in blocks:
        exec(block, names)
    gaps = names["batch"].sequences["history"].features["gap"]
    assert gaps.shape == (2, 2)  # of the first two samples: contexts of one and two events
    assert names["batch"].target_item_BT.shape == (2, 1)


@pytest.mark.parametrize("path", BENCHMARKS)
def test_what_a_benchmark_imports_is_there(path):
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("onetrain"):
            found = importlib.import_module(node.module)
            for name in (alias.name for alias in node.names):
                assert hasattr(found, name) or importlib.util.find_spec(f"{node.module}.{name}"), name
