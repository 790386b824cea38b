"""Manifests are held against their types: what does not fit is named with its place."""

import json

import pytest

from lexigraft.errors import LexigraftError
from lexigraft.manifest import BaseTokenizer, GraftRecord, Manifest, ReplacedToken, StartRecord
from lexigraft.typed_json import MisfitError, parsed

BASE = {"name": "base", "token_map": "0", "tokens": 5}
PRUNED = {
    "stage": "prune", "base": BASE, "rows_before": 5, "tied": True, "base_rows": {}, "removed": "1 3-4",
    "token_map": "1", "content": "2", "tokens": 2, "rows": 2, "settings": {"keep": [1, None, "x"]},
    "sources": {"text": [{"name": "a", "sha256": "b", "bytes": 1}]}, "versions": {}, "roles": None,
}  # fmt: skip
MERGED = {
    "stage": "merge", "adapters": ["a"], "token_map": "1", "rows": 2, "tied": False, "versions": {},
}  # fmt: skip


def test_a_manifest_is_read_and_written_as_it_was():
    data = {"format": 1, "records": [PRUNED, {**MERGED, "weights": [1, 0.5], "body_only": True}]}
    found = parsed(Manifest, data)
    assert found.to_json() == data
    assert found.last("prune").places == {0: 0, 2: 1}
    assert found.last("merge").weights == [1.0, 0.5]
    assert [type(weight) for weight in found.last("merge").weights] == [float, float]


def test_later_fields_are_left_out_of_a_record_that_has_none_and_others_are_not():
    assert parsed(Manifest, {"format": 1, "records": [MERGED]}).to_json()["records"] == [MERGED]
    assert StartRecord(methods={}, reason="").to_json() == {
        "methods": {}, "reason": "", "copies": [], "donor": None,
    }  # fmt: skip
    graft = GraftRecord(
        base=BaseTokenizer(**BASE), rows_before=5, tied=True, base_rows={}, token_map="1", tokens=6,
        first_id=5, rows=6, pad_to=1, init="mean", seed=0, new_rows={}, versions={},
    )  # fmt: skip
    assert graft.to_json().keys() & {"stage", "start", "roles", "replaced"} == {"stage"}


def without(record: dict, name: str) -> dict:
    return {key: value for key, value in record.items() if key != name}


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (7, "records.0: 7 is not an object"),
        ({"stage": "sing"}, "records.0.stage: 'sing' is none of learn, graft, train, "),
        ({}, "records.0.stage: None is none of learn, "),
        ({"stage": ["merge"]}, "records.0.stage: ['merge'] is none of learn, "),
        (without(MERGED, "rows"), "records.0.rows: is missing"),
        ({**MERGED, "mood": 1}, "records.0.mood: is unknown"),
        ({**MERGED, "rows": "2"}, "records.0.rows: '2' is not a whole number"),
        ({**MERGED, "rows": True}, "records.0.rows: True is not a whole number"),
        ({**MERGED, "rows": None}, "records.0.rows: None is not a whole number"),
        ({**MERGED, "tied": 0}, "records.0.tied: 0 is not true or false"),
        ({**MERGED, "adapters": {}}, "records.0.adapters: {} is not a list"),
        ({**MERGED, "adapters": ["a", 1]}, "records.0.adapters.1: 1 is not a string"),
        ({**MERGED, "versions": {"numpy": 2}}, "records.0.versions.numpy: 2 is not a string"),
        ({**MERGED, "weights": [1, "1"]}, "records.0.weights.1: '1' is not a number"),
        ({**MERGED, "weights": [False]}, "records.0.weights.0: False is not a number"),
        ({**MERGED, "weights": [10**400]}, "records.0.weights.0: 100000000"),
        ({**MERGED, "body_only": 1}, "records.0.body_only: 1 is not True"),
        ({**PRUNED, "base": {**BASE, "tokens": 1.5}}, "records.0.base.tokens: 1.5 is not a whole"),
        ({**PRUNED, "removed": "1,2"}, "records.0: removed: '1,2' is not ids such as '12 40-57'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_with_its_place(record, said, tmp_path):
    (tmp_path / "lexigraft.json").write_text(json.dumps({"format": 1, "records": [record]}))
    with pytest.raises(LexigraftError) as caught:
        Manifest.read(tmp_path)
    assert f"lexigraft.json: {said}" in caught.value.found


def test_a_newer_format_and_what_is_no_object_are_refused():
    with pytest.raises(MisfitError, match=r"^format: 2 is not 1$"):
        parsed(Manifest, {"format": 2, "records": []})
    with pytest.raises(MisfitError, match=r"^format: True is not 1$"):
        parsed(Manifest, {"format": True})
    with pytest.raises(MisfitError, match=r"^\[\] is not an object$"):
        parsed(Manifest, [])
    assert parsed(ReplacedToken, {"id": 1, "old": "a", "new": "b"}) == ReplacedToken(
        id=1, old="a", new="b"
    )
