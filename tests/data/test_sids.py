import json
from dataclasses import dataclass, replace

import numpy as np
import pytest

from onetrain.data.errors import DataError
from onetrain.data.sids import SidMap


@dataclass(frozen=True)
class Stamp:
    """The two fields of a manifest that a SID map is checked against."""

    catalogue_fingerprint: str
    sid_fingerprint: str | None


def random_map(seed=0, items=50, sizes=(8, 6, 4)):
    rng = np.random.default_rng(seed)
    codes = np.stack([rng.integers(size, size=items) for size in sizes], axis=1)
    codebooks = tuple(rng.normal(size=(size, 5)).astype(np.float32) for size in sizes[:2])
    return SidMap(codes, sizes, codebooks, "catalogue-a")


def test_round_trip(tmp_path):
    sids = random_map()
    sids.save(tmp_path / "sids")
    back = SidMap.load(tmp_path / "sids")
    np.testing.assert_array_equal(back.codes_IL, sids.codes_IL)
    assert back.codes_IL.dtype == np.int64
    assert back.sizes == sids.sizes
    assert back.fingerprint == sids.fingerprint
    for a, b in zip(back.codebooks, sids.codebooks, strict=True):
        np.testing.assert_array_equal(a, b)
    assert [path.name for path in tmp_path.iterdir()] == ["sids"]


def test_a_later_map_replaces_the_earlier(tmp_path):
    random_map(0).save(tmp_path / "sids")
    random_map(1, items=20).save(tmp_path / "sids")
    assert SidMap.load(tmp_path / "sids").fingerprint == random_map(1, items=20).fingerprint
    assert [path.name for path in tmp_path.iterdir()] == ["sids"]


def test_an_interrupted_save_leaves_the_earlier_map(tmp_path, monkeypatch):
    random_map(0).save(tmp_path / "sids")

    def interrupt(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr("onetrain.data.sids.json.dumps", interrupt)
    with pytest.raises(KeyboardInterrupt):
        random_map(1).save(tmp_path / "sids")
    monkeypatch.undo()
    assert SidMap.load(tmp_path / "sids").fingerprint == random_map(0).fingerprint
    assert [path.name for path in tmp_path.iterdir()] == ["sids"]


def test_the_fingerprint_sees_every_part():
    sids = random_map()
    codes = sids.codes_IL.copy()
    codes[7, 1] = (codes[7, 1] + 1) % 6
    books = (sids.codebooks[0] + np.float32(1e-3), sids.codebooks[1])
    variants = [
        sids,
        replace(sids, codes_IL=codes),
        replace(sids, sizes=(8, 6, 5)),
        replace(sids, codebooks=books),
        replace(sids, codebooks=()),
        replace(sids, catalogue_fingerprint="catalogue-b"),
    ]
    assert len({variant.fingerprint for variant in variants}) == len(variants)


@pytest.mark.parametrize("damage", ["flip", "truncate", "text", "sizes", "gone"])
def test_damage_is_found(tmp_path, damage):
    random_map().save(tmp_path)
    tensors, description = tmp_path / "sids.safetensors", tmp_path / "sids.json"
    content = bytearray(tensors.read_bytes())
    if damage == "flip":
        content[-3] ^= 1
        tensors.write_bytes(content)
    elif damage == "truncate":
        tensors.write_bytes(content[:-100])
    elif damage == "text":
        description.write_text("{")
    elif damage == "sizes":
        description.write_text(json.dumps(json.loads(description.read_text()) | {"sizes": [8, 6, 9]}))
    else:
        tensors.unlink()
    with pytest.raises(DataError, match="damaged"):
        SidMap.load(tmp_path)


def test_no_map_says_what_to_run(tmp_path):
    with pytest.raises(DataError, match="onetrain tokenize"):
        SidMap.load(tmp_path / "absent")


def test_codes_outside_their_level_are_refused():
    sids = random_map()
    with pytest.raises(DataError, match=r"outside the level sizes \[2, 6, 4\]"):
        replace(sids, sizes=(2, 6, 4))
    with pytest.raises(DataError, match="2 level sizes"):
        replace(sids, sizes=(8, 6))


def test_foreign_maps_name_both_sides():
    sids = random_map()
    sids.check_against(Stamp("catalogue-a", sids.fingerprint))
    with pytest.raises(DataError, match=r"foreign.*catalogue-a.*catalogue-b"):
        sids.check_against(Stamp("catalogue-b", sids.fingerprint))
    with pytest.raises(DataError, match=rf"foreign.*{sids.fingerprint}.*0123"):
        sids.check_against(Stamp("catalogue-a", "0123"))
    with pytest.raises(DataError, match="no SID map"):
        sids.check_against(Stamp("catalogue-a", None))
