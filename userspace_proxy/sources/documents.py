"""YAML and JSON text becomes plain values here: dicts with text as keys, lists, text, numbers, booleans, None.

The text is untrusted. YAML is read event by event: PyYAML's own composer recurses in C and takes the process down at
a few thousand opening brackets, its constructor takes the last of two equal keys in silence, and both let a few lines
of aliases stand for gigabytes. Dates stay text, as they are for Kubernetes.

What makes a whole file unreadable is raised; what spoils one document, or one item of a List, is told with it, beside
the value, so that one still sees which object it was to be.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from userspace_proxy.sources.checks import show

MAX_DEPTH = 100
MAX_ALIASED = 100_000
"""Values that aliases may stand for in one document, beyond those that are written out."""

_TAG = "tag:yaml.org,2002:"
_IGNORED = object()
_NO_KEY = object()
_MERGE = object()


class SyntaxProblem(ValueError):
    """The text cannot be read; says where and why."""


@dataclass(slots=True)
class Document:
    value: Any = None
    line: int = 1
    problems: list[tuple[int | None, str]] = field(default_factory=list)
    """Each with the identity (`id`) of the item of a List that it is in, if it is in any."""

    def problems_of(self, item: object) -> list[str]:
        return [text for inside, text in self.problems if item is self.value or inside in (None, id(item))]


def read_json(text: bytes) -> list[Document]:
    """Raises SyntaxProblem."""
    try:
        return [Document(json.loads(text, object_pairs_hook=_unique))]
    except _Duplicate:
        return read_yaml(text)  # which is a superset, and knows lines
    except json.JSONDecodeError as error:
        raise SyntaxProblem(f"line {error.lineno}, column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise SyntaxProblem("found values nested deeper than any Kubernetes object") from None
    except ValueError as error:  # not UTF-8, or a number of thousands of digits
        raise SyntaxProblem(str(error)) from None


def read_yaml(text: bytes) -> list[Document]:
    """Raises SyntaxProblem."""
    try:
        return list(_read_events(yaml.parse(text, Loader=yaml.CSafeLoader)))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{_place(mark)}: " if mark else ""
        raise SyntaxProblem(f"{where}{error.problem or error.context}") from None
    except yaml.reader.ReaderError as error:
        raise SyntaxProblem(f"position {error.position}: {error.reason}; allowed: UTF-8 text") from None
    except UnicodeDecodeError as error:
        raise SyntaxProblem(str(error)) from None


class _Duplicate(Exception):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _Duplicate
    return found


def _read_events(events: Iterator[Any]) -> Iterator[Document]:
    reader = _Reader(Document())
    for event in events:
        if isinstance(event, yaml.DocumentStartEvent):
            mark: Any = event.start_mark
            reader = _Reader(Document(line=mark.line + 1))
        elif isinstance(event, yaml.DocumentEndEvent):
            yield reader.document
        elif isinstance(event, yaml.ScalarEvent):
            reader.scalar(event)
        elif isinstance(event, yaml.AliasEvent):
            reader.alias(event)
        elif isinstance(event, yaml.CollectionStartEvent):
            reader.open(event)
        elif isinstance(event, yaml.CollectionEndEvent):
            reader.close(event)


@dataclass(slots=True)
class _Frame:
    """A list or mapping that is still open."""

    value: Any
    anchor: str | None
    weight_before: int
    key: Any = _NO_KEY
    merged: list[dict[str, Any]] = field(default_factory=list)


class _Reader:
    """Builds the value of one document from its events."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self._open: list[_Frame] = []
        self._anchors: dict[str, tuple[Any, int]] = {}
        self._weight = 0
        """Values so far, counting what an alias stands for each time anew."""
        self._aliased = 0

    def scalar(self, event: yaml.ScalarEvent) -> None:
        value: Any = event.value
        tag: str = event.tag if event.tag and event.tag != "!" else _resolve(event.value, event.implicit)
        if tag == _TAG + "merge" and self._open and self._open[-1].key is _NO_KEY:
            value = _MERGE
        elif tag not in (_TAG + "str", _TAG + "merge", _TAG + "value"):
            try:
                value = _SCALARS[tag](value)
            except KeyError:
                self._problem(event, f"found the tag {show(tag)}; allowed: plain values")
            except (ValueError, IndexError, OverflowError):
                self._problem(event, f"found {show(value)}; allowed: {tag.removeprefix(_TAG)}, which it claims to be")
        self._weight += 1
        if event.anchor:
            self._anchors[event.anchor] = value, 1
        self._put(value, event)

    def alias(self, event: yaml.AliasEvent) -> None:
        value, weight = self._anchors.get(str(event.anchor), (None, 0))
        self._aliased += weight
        self._weight += weight
        if not weight:
            self._problem(event, f"found the alias *{event.anchor}; allowed: one of an anchor that stands before it")
        elif self._aliased > MAX_ALIASED:
            value = None
            if self._aliased - weight <= MAX_ALIASED:
                self._problem(
                    event, f"found aliases for more than {MAX_ALIASED} values; allowed: fewer; write them out"
                )
        self._put(value, event)

    def open(self, event: yaml.CollectionStartEvent) -> None:
        if len(self._open) >= MAX_DEPTH:
            raise SyntaxProblem(f"{_place(event.start_mark)}: found more than {MAX_DEPTH} levels of nesting")
        is_mapping = isinstance(event, yaml.MappingStartEvent)
        if event.tag not in (None, "!", _TAG + ("map" if is_mapping else "seq")):
            self._problem(event, f"found the tag {show(event.tag)}; allowed: plain values")
        if event.anchor:
            self._anchors.pop(event.anchor, None)
        self._weight += 1
        self._open.append(_Frame({} if is_mapping else [], event.anchor, self._weight - 1))

    def close(self, event: yaml.CollectionEndEvent) -> None:
        frame = self._open.pop()
        for merged in frame.merged:
            for key, value in merged.items():
                frame.value.setdefault(key, value)
        if frame.anchor:
            self._anchors[frame.anchor] = frame.value, self._weight - frame.weight_before
        self._put(frame.value, event)

    def _put(self, value: Any, event: yaml.Event) -> None:
        if not self._open:
            self.document.value = value
            return
        frame = self._open[-1]
        if isinstance(frame.value, list):
            frame.value.append(value)
        elif frame.key is _NO_KEY:
            frame.key = self._key(value, frame, event)
        else:
            if frame.key is _MERGE:
                self._merge(value, frame, event)
            elif frame.key is not _IGNORED:
                frame.value[frame.key] = value
            frame.key = _NO_KEY

    def _key(self, key: Any, frame: _Frame, event: yaml.Event) -> Any:
        if key is _MERGE:
            return key
        if not isinstance(key, str):
            self._problem(event, f"found the key {show(key)}; allowed: text; put it in quotes")
            return _IGNORED
        if key in frame.value:
            self._problem(event, f"found the key {show(key)} twice; allowed: once")
            return _IGNORED
        return key

    def _merge(self, value: Any, frame: _Frame, event: yaml.Event) -> None:
        merged = value if isinstance(value, list) else [value]
        if all(isinstance(each, dict) for each in merged):
            frame.merged.extend(merged)
        else:
            self._problem(event, f"found {show(value)} to merge; allowed: a mapping, or a list of mappings")

    def _problem(self, event: yaml.Event, text: str) -> None:
        inside = id(self._open[2].value) if len(self._open) > 2 else None
        self.document.problems.append((inside, f"{_place(event.start_mark)}: {text}"))


_RESOLVER = yaml.resolver.Resolver()
_RESOLVER.yaml_implicit_resolvers = {  # YAML 1.1 without dates
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _TAG + "timestamp"]
    for first, resolvers in yaml.resolver.Resolver.yaml_implicit_resolvers.items()
}
_CONSTRUCTOR = yaml.constructor.SafeConstructor()


def _resolve(value: str, implicit: tuple[bool, bool]) -> str:
    resolve: Any = _RESOLVER.resolve
    return str(resolve(yaml.ScalarNode, value, implicit))


def _int(value: str) -> int:
    return int(_CONSTRUCTOR.construct_yaml_int(yaml.ScalarNode(_TAG + "int", value)))


def _float(value: str) -> float:
    return float(_CONSTRUCTOR.construct_yaml_float(yaml.ScalarNode(_TAG + "float", value)))


def _bool(value: str) -> bool:
    try:
        return yaml.constructor.SafeConstructor.bool_values[value.lower()]
    except KeyError:
        raise ValueError(value) from None


_SCALARS = {_TAG + "null": lambda _: None, _TAG + "bool": _bool, _TAG + "int": _int, _TAG + "float": _float}


def _place(mark: Any) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}"
