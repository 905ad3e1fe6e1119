import json

import pytest
from raw_events import options, prepare_and_open, random_events, shuffled_rows, write_rows

from onetrain.data.errors import DataError
from onetrain.data.manifest import Manifest


@pytest.fixture
def manifest(tmp_path):
    return prepare_and_open(options(tmp_path, write_rows(tmp_path / "log", shuffled_rows(random_events(0), 0))))[0]


def test_saved_and_loaded_manifests_are_equal(tmp_path, manifest):
    assert Manifest.load(tmp_path / "prepared") == manifest
    text = (tmp_path / "prepared" / "manifest.json").read_text()
    assert str(tmp_path) not in text
    assert json.loads(text)["format"] == 3


def test_sid_fingerprint_is_stamped_and_no_part_of_the_fingerprint(tmp_path, manifest):
    assert manifest.sid_fingerprint is None
    stamped = manifest.with_sid_fingerprint("abc")
    stamped.save(tmp_path / "prepared")
    loaded = Manifest.load(tmp_path / "prepared")
    assert loaded.sid_fingerprint == "abc"
    assert loaded.fingerprint == manifest.fingerprint
    assert [path.name for path in (tmp_path / "prepared").iterdir() if "tmp" in path.name] == []


def test_missing_damaged_and_foreign_manifests(tmp_path, manifest):
    path = tmp_path / "prepared" / "manifest.json"
    raw = json.loads(path.read_text())
    for text, message in [
        ("{", "no valid JSON"),
        ("[]", "has format None"),
        (json.dumps({**raw, "format": 99}), "has format 99"),
        (json.dumps({name: value for name, value in raw.items() if name != "users"}), "is damaged.*users"),
        (json.dumps({**raw, "shards": [{"file": "x"}]}), "is damaged"),
    ]:
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            Manifest.load(tmp_path / "prepared")
    path.unlink()
    with pytest.raises(DataError, match="Run `onetrain prepare` first"):
        Manifest.load(tmp_path / "prepared")
