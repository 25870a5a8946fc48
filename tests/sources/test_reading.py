"""Texts in pieces and whole: the same objects, and nothing read again that is known."""

from __future__ import annotations

import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from userspace_proxy.sources import reading
from userspace_proxy.sources.documents import read_yaml
from userspace_proxy.sources.reading import read
from userspace_proxy.sources.store import Refused


def service(number, port=80):
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": f"s{number}"},
        "spec": {"clusterIP": f"10.96.0.{number}", "ports": [{"port": port}]},
    }


def as_yaml(objects):
    return yaml.safe_dump_all(objects, explicit_start=True).encode()


def as_json(objects):
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}).encode()


on_both = pytest.mark.parametrize(("file", "dump"), [("a.yaml", as_yaml), ("a.json", as_json)])


@pytest.fixture
def decoded(monkeypatch):
    """The names of the objects that were decoded."""
    names = []
    original = reading.decode

    def spy(value, *args, **options):
        names.append(value["metadata"]["name"])
        return original(value, *args, **options)

    monkeypatch.setattr(reading, "decode", spy)
    return names


@on_both
def test_only_what_changed_is_read_again(file, dump, decoded):
    before, known = read(file, dump([service(n) for n in range(1, 101)]), {})
    assert len(before) == len(decoded) == 100
    decoded.clear()
    after, known = read(file, dump([service(n, port=81 if n == 7 else 80) for n in range(1, 101)]), known)
    assert decoded == ["s7"]
    assert [n for n, (old, new) in enumerate(zip(before, after, strict=True), 1) if old is not new] == [7]
    decoded.clear()
    rest, _ = read(file, dump([service(n) for n in range(100, 1, -1) if n != 7]), known)
    assert decoded == []
    assert rest == [after[n - 1] for n in range(100, 1, -1) if n != 7]


@on_both
def test_one_mistake_makes_the_whole_be_read(file, dump):
    _, known = read(file, dump([service(1), service(2)]), {})
    found, known = read(file, dump([service(1), service(2, port=0), service(3)]), known)
    assert not known
    assert [isinstance(each, Refused) for each in found] == [False, True, False]
    if file == "a.yaml":
        assert "(document 2, line 10)" in found[1].problem


@on_both
def test_an_object_that_is_there_twice_comes_twice(file, dump):
    found, _ = read(file, dump([service(1), service(1)]), {})
    assert len(found) == 2


def test_a_typed_list_gives_its_items_their_kind():
    item = {key: value for key, value in service(1).items() if key not in ("apiVersion", "kind")}
    text = json.dumps({"kind": "ServiceList", "apiVersion": "v1", "items": [item, service(2)]}).encode()
    found, known = read("a.json", text, {})
    assert [each.identity.name for each in found] == ["s1", "s2"]
    assert len(known) == 2


@pytest.mark.parametrize(
    "text",
    [
        b'{"kind": "List", "items": [], "items": [1, 2]}',
        b'{"kind": "List", "x": [{}, {}], "items": [{}, {}]}',
        b'{"kind": "Service", "items": [1, 2]}',
        b'{"items": [1, 2]}',
        b"[1, 2]",
        b'{"kind": "List", "items": [1, 2',
        b"\xff",
    ],
)
def test_json_that_is_not_taken_apart(text):
    pieces = reading._json_pieces(text)
    assert pieces == [text] or any(problem for piece in pieces for problem in reading._documents(piece, is_json=True))


@pytest.mark.parametrize(
    "text",
    [
        b"a: 1",
        b"---\na: 1\n---\nb: 2\n",
        b"# first\n---\n# nothing\n---\r\nb: 2\r\n--- {c: 3}\n---",
        b"a: |\n  ---\n  b\n---\nc: 1\n...\n---\nd: 1\n",
        b"%YAML 1.1\n---\na: 1\n...\n%YAML 1.1\n---\nb: 1\n",
        b"\xef\xbb\xbfa: 1\n---\nb: 2\n",
        "---\na: 1\n---\nb: 1\n".encode("utf-16"),
        b"a: 1\r---\rb: 2\n---\nc: 3\n",
        b"---a: 1\n",
        b"&x a: *x\n--- &x\nb: 1\n",
    ],
)
def test_yaml_in_pieces_is_the_same(text):
    whole = [document.value for document in read_yaml(text)]
    assert [document.value for piece in reading._yaml_pieces(text) for document in read_yaml(piece)] == whole
    assert b"".join(reading._yaml_pieces(text)) == text


scalars = st.text("ab-#\n ", max_size=8) | st.integers(0, 9) | st.none()
values = st.recursive(scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text("ab-", min_size=1), v))


@given(st.lists(values, min_size=1, max_size=5), st.booleans(), st.sampled_from([None, "|", '"', "'"]))
def test_any_yaml_in_pieces_is_the_same(found, flow, style):
    text = yaml.dump_all(found, explicit_start=True, default_flow_style=flow, default_style=style, width=5).encode()
    whole = [document.value for document in read_yaml(text)]
    assert [document.value for piece in reading._yaml_pieces(text) for document in read_yaml(piece)] == whole
