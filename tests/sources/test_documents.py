from __future__ import annotations

import tracemalloc

import pytest

from userspace_proxy.sources.documents import MAX_DEPTH, SyntaxProblem, read_json, read_yaml


def one(text: str):
    (document,) = read_yaml(text.encode())
    return document


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: 1\nb: [x, 2.5, true, null, ~]", {"a": 1, "b": ["x", 2.5, True, None, None]}),
        ("day: 2024-01-31", {"day": "2024-01-31"}),
        ("a: '1'\nb: !!str 1", {"a": "1", "b": "1"}),
        ("a: 0x10\nb: 1_000", {"a": 16, "b": 1000}),
        ("a: &x {b: 1}\nc: *x", {"a": {"b": 1}, "c": {"b": 1}}),
        ("a: &x {b: 1, c: 2}\nd:\n  <<: *x\n  b: 3", {"a": {"b": 1, "c": 2}, "d": {"b": 3, "c": 2}}),
        ('{"json": [1, {"is": "yaml"}]}', {"json": [1, {"is": "yaml"}]}),
        ("just text", "just text"),
    ],
)
def test_values(text, value):
    document = one(text)
    assert (document.value, document.problems) == (value, [])


def test_several_documents_know_their_lines():
    documents = read_yaml(b"# first\n---\na: 1\n---\n---\nb: 2\n")
    assert [(d.value, d.line) for d in documents] == [({"a": 1}, 2), (None, 4), ({"b": 2}, 5)]
    assert read_yaml(b"") == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\nb: 2\na: 3", "line 3, column 1: found the key 'a' twice"),
        ("80: a", "line 1, column 1: found the key 80; allowed: text; put it in quotes"),
        ("{[1]: 2}", "found the key [1]; allowed: text"),
        ("a: !!python/object:os.system x", "found the tag 'tag:yaml.org,2002:python/object:os.system'"),
        ("a: !mine [1]", "found the tag '!mine'"),
        ("a: !!int word", "found 'word'; allowed: int, which it claims to be"),
        ("a: !!bool word", "found 'word'; allowed: bool"),
        ("a: " + "9" * 5000, "allowed: int"),
        ("a: *nobody", "found the alias *nobody"),
        ("a: &me [*me]", "found the alias *me"),
        ("<<: 5", "found 5 to merge"),
    ],
)
def test_what_spoils_a_document_is_told_and_the_rest_is_read(text, problem):
    document = one("before: 1\n" + text if not text.startswith(("{", "a: 1")) and "line 1" not in problem else text)
    assert len(document.problems) == 1
    assert problem in document.problems[0][1]
    assert isinstance(document.value, dict)


@pytest.mark.parametrize("link", ["[*a{0}, *a{0}, *a{0}, *a{0}]", "{{<<: [*a{0}, *a{0}], k{0}: 1}}"])
def test_alias_bombs_are_defused(link):
    start = "a0: &a0 {k: 1}\n"
    text = start + "".join(f"a{i + 1}: &a{i + 1} {link.format(i)}\n" for i in range(40))
    tracemalloc.start()
    document = one(text)
    assert tracemalloc.get_traced_memory()[1] < 5 << 20
    tracemalloc.stop()
    assert [text for _, text in document.problems if "aliases for more than" in text]


@pytest.mark.parametrize("text", ["[" * 200_000, "- " * 50_000 + "a", "{a: " * 5000])
def test_deep_nesting_is_no_crash(text):
    with pytest.raises(SyntaxProblem, match=f"more than {MAX_DEPTH} levels"):
        read_yaml(text.encode())


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"a: 1\nb: [1, 2\n", "line 3, column 1: did not find expected"),
        (b"a:\n\tb: 2\n", "line 2, column 1: found character"),
        (b"a: \xff\xfe", "allowed: UTF-8 text"),
        (b"a: \x00", "position 3: control characters"),
        (b"a: 'open", "found unexpected end of stream"),
    ],
)
def test_syntax_errors_tell_the_place(text, problem):
    with pytest.raises(SyntaxProblem) as caught:
        read_yaml(text)
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b'{"a": 1,\n "b": }', "line 2, column 7: Expecting value"),
        (b"", "line 1, column 1"),
        (b'{"a": "\xff"}', "utf-8"),
        (b'{"a": ' + b"9" * 5000 + b"}", "4300 digits"),
        (b"[" * 500_000, "nested deeper"),
    ],
)
def test_json_errors_tell_the_place(text, problem):
    with pytest.raises(SyntaxProblem) as caught:
        read_json(text)
    assert problem in str(caught.value)


def test_json_with_a_key_twice_tells_the_line():
    (document,) = read_json(b'{"a": 1,\n\t"b": {"c": 1,\n\t\t"c": 2}}')
    assert document.problems == [(None, "line 3, column 3: found the key 'c' twice; allowed: once")]


def test_problems_belong_to_one_item_of_a_list():
    document = one("kind: List\nitems:\n- {a: 1, a: 2}\n- {a: 1, b: {c: 1, 5: 2}}\n- {a: 1}\n")
    problems = [document.problems_of(item) for item in document.value["items"]]
    assert [len(found) for found in problems] == [1, 1, 0]
    assert len(document.problems_of(document.value)) == 2
