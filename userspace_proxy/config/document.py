"""The config file: a KubeProxyConfiguration, read and written.

YAML or JSON, which is YAML. What cannot be used is a problem, with the place where it is; a field that nobody knows, or
that is there twice, is worth a notice only, so that a file for another version of kube-proxy is no reason to stand
still. Which fields there are is in `table`; what a file and flags mean together is for `reading`.
"""

from __future__ import annotations

import difflib
import typing
from dataclasses import dataclass, field

import yaml

from userspace_proxy.config.table import API_VERSION, FLAGS, KIND, AnyFlag, Config, as_document, settings

_PLACES = {flag.place: flag for flag in FLAGS.values() if flag.place}
_SECTIONS = {place.partition(".")[0] for place in _PLACES if "." in place}
_WHOLE = {"apiVersion": API_VERSION, "kind": KIND}
_TAGS: dict[type, tuple[str, ...]] = {str: ("str",), bool: ("bool",), int: ("int",), float: ("int", "float")}
_NAMES = {str: "a string", bool: "true or false, without quotes", int: "a whole number", float: "a number"}


@dataclass
class Document:
    """What a file says."""

    values: dict[str, typing.Any] = field(default_factory=dict)
    """By the names of the flags. What the file leaves as it is by itself is not among them."""
    problems: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    unusable: set[str] = field(default_factory=set)
    """Names of flags whose values could not be read."""


def read_document(text: str, file: str) -> Document:
    """Raises nothing: what is wrong is among the problems."""
    found = Document()
    try:
        root = yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError as error:
        found.problems.append(_not_yaml(error, file))
    except RecursionError:
        found.problems.append(f"{file}: nested too deeply; allowed: a {KIND}")
    else:
        if isinstance(root, yaml.MappingNode):
            _Reader(file, found).read(root)
        else:
            found.problems.append(f"{file}: not a mapping; allowed: a {KIND}, as --write-config-to writes it")
    return found


def render(config: Config) -> str:
    """As kube-proxy writes it, except for the flags that have no place there."""
    return yaml.dump(as_document(config), Dumper=_Dumper, default_flow_style=False, allow_unicode=True)


def only_flags(config: Config) -> list[str]:
    """Names of the flags that were set and have no place in the file."""
    defaults = Config()
    return [
        flag.name
        for (flag, value), (_, default) in zip(settings(config), settings(defaults), strict=True)
        if not flag.place and value != default
    ]


def not_kept(config: Config) -> list[str]:
    """Notices of what is written and not read back: where Go cannot tell a zero from nothing, it is the default."""
    read = read_document(render(config), "").values
    notices = []
    for (flag, value), (_, default) in zip(settings(config), settings(Config()), strict=True):
        if flag.place and flag.kind.as_json(value) != flag.kind.as_json(read.get(flag.name, default)):
            name = flag.place if flag.in_file_only else f"--{flag.name}"
            notices.append(f"{name}={flag.kind.show(value)!r}: the file cannot say so; there it stands for the default")
    return notices


class _Dumper(yaml.SafeDumper):
    """Texts as Go writes them: with double quotes, where they need any. Others do not keep every line break."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", text, None if text.isprintable() and text else '"')


_Dumper.add_representer(str, _Dumper.represent_text)


class _Reader:
    def __init__(self, file: str, found: Document) -> None:
        self._file = file
        self._found = found

    def read(self, root: yaml.MappingNode) -> None:
        there = {str(key.value): node for key, node in root.value}
        for name, only in _WHOLE.items():
            if name not in there:
                self._found.problems.append(f"{self._file}: no {name}; allowed: {only}; write {name}: {only}")
            elif there[name].value != only:
                at = self._at(there[name])
                self._found.problems.append(f"{at}: {name}: {there[name].value!r}; allowed: {only}; write it so")
        if not self._found.problems:
            self._fields(root, "")

    def _fields(self, mapping: yaml.MappingNode, section: str) -> None:
        self._tell_duplicates(mapping, section)
        for key, node in mapping.value:
            name = str(key.value)
            place = f"{section}.{name}" if section else name
            if place in _PLACES:
                self._value(_PLACES[place], node)
            elif place in _SECTIONS:
                self._section(place, node)
            elif place not in _WHOLE:
                self._found.notices.append(
                    f"{self._at(key)}: no field {place!r} is known{_nearest(place)}; passed over"
                )

    def _tell_duplicates(self, mapping: yaml.MappingNode, section: str) -> None:
        lines: dict[str, int] = {}
        for key, _ in mapping.value:
            place = f"{section}.{key.value}" if section else str(key.value)
            if place in lines:
                said = f"{self._at(key)}: {place} is in line {lines[place]} already; what comes last counts"
                self._found.notices.append(said)
            lines[place] = key.start_mark.line + 1

    def _section(self, name: str, node: yaml.Node) -> None:
        if isinstance(node, yaml.MappingNode):
            self._fields(node, name)
        elif not _is_null(node):
            self._found.problems.append(f"{self._at(node)}: {name}: not a mapping; allowed: fields, indented")

    def _value(self, flag: AnyFlag, node: yaml.Node) -> None:
        self._found.values.pop(flag.name, None)
        if flag.kind.json is dict and isinstance(node, yaml.MappingNode):
            self._tell_duplicates(node, flag.place)
        try:
            parts = [text for text in _texts(flag, node) if flag.keeps_zero or not flag.kind.is_zero(text)]
            if flag.kind.repeats and parts:
                self._found.values[flag.name] = tuple(each for text in parts for each in flag.kind.parse(text))
            elif parts:
                self._found.values[flag.name] = flag.kind.parse(parts[0])
        except ValueError as why:
            self._found.unusable.add(flag.name)
            found = f"{node.value!r}: " if isinstance(node, yaml.ScalarNode) else ""
            said = f"{self._at(node)}: {flag.place}: {found}{why}; allowed: {flag.kind.allowed}"
            self._found.problems.append(f"{said}; write for example {_example(flag)}")

    def _at(self, node: yaml.Node) -> str:
        return f"{self._file}:{node.start_mark.line + 1}"


def _texts(flag: AnyFlag, node: yaml.Node) -> list[str]:
    """The values as one would write them in flags: none for null, several for a list or a map."""
    if _is_null(node):
        return []
    if flag.kind.json is list:
        if not isinstance(node, yaml.SequenceNode):
            raise ValueError("not a list")
        return [_text(each, str) for each in node.value]
    if flag.kind.json is dict:
        if not isinstance(node, yaml.MappingNode):
            raise ValueError("not a mapping")
        return [f"{key.value}={_text(value, bool)}" for key, value in node.value]
    return [_text(node, flag.kind.json)]


def _text(node: yaml.Node, wanted: type) -> str:
    tag = node.tag.rpartition(":")[2]
    if wanted is float and isinstance(node, yaml.ScalarNode) and tag == "str" and not node.style:
        return str(node.value)  # 1e3 is a number to Go, and text to PyYAML
    if not isinstance(node, yaml.ScalarNode) or (tag not in _TAGS[wanted] and (wanted, node.value) != (str, "0")):
        quotes = ", in quotes" if wanted is str and isinstance(node, yaml.ScalarNode) else ""
        raise ValueError(f"not {_NAMES[wanted]}{quotes}")
    if tag == "str" or node.value == "0":
        return str(node.value)
    try:
        value = yaml.constructor.SafeConstructor().construct_object(node)
    except (LookupError, ValueError):  # tagged as what it is not
        raise ValueError(f"not {_NAMES[wanted]}") from None
    return str(value).lower() if wanted is bool else str(value)


def _is_null(node: yaml.Node) -> bool:
    return bool(node.tag == "tag:yaml.org,2002:null")


def _example(flag: AnyFlag) -> str:
    """In flow style, so that it is one line."""
    name, kind = flag.place.rpartition(".")[2], flag.kind
    written = yaml.dump(kind.as_json(kind.parse(kind.example)), Dumper=_Dumper, default_flow_style=True, width=1000)
    return f"{name}: {written.removesuffix(chr(10)).removesuffix('...').strip()}"


def _nearest(place: str) -> str:
    """The field that was meant: one of a like name beside it, or one of its name elsewhere."""
    known = [*_PLACES, *_SECTIONS, *_WHOLE]
    section, _, name = place.rpartition(".")
    beside = {each.rpartition(".")[2].lower(): each for each in known if each.rpartition(".")[0] == section}
    elsewhere = [each for each in known if each.rpartition(".")[2].lower() == name.lower()]
    near = [beside[each] for each in difflib.get_close_matches(name.lower(), beside, n=1)] or elsewhere
    return f"; did you mean {near[0]}?" if near else ""


def _not_yaml(error: yaml.YAMLError, file: str) -> str:
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or str(error).partition("\n")[0]
    hint = "; an address such as :: needs quotes" if mark and "::" in (mark.get_snippet() or "") else ""
    return f"{file}{f':{mark.line + 1}' if mark else ''}: not YAML: {what}{hint}"
