"""The text of one manifest becomes the objects in it, those that cannot be used among them, and why.

A file of thousands of objects usually changes in one of them, so what can be told apart without reading it is: YAML
documents, and the items of a JSON List. A piece that was read before, and nothing was wrong with it, gives the very
same objects again. As soon as anything is wrong with any piece, the whole file is read as it stands, because people
want to be told of lines and documents.

How text becomes values is in `documents`, what objects mean in `objects`; which files there are, in `manifests`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping

import msgspec

from userspace_proxy.exceptions import ObjectError
from userspace_proxy.sources.documents import Document, SyntaxProblem, read_json, read_yaml
from userspace_proxy.sources.identity import identify, is_other_kind, unpack
from userspace_proxy.sources.objects import decode
from userspace_proxy.sources.store import Object, Refused

Known = Mapping[bytes, tuple[Object, ...]]
"""What was found in pieces of a file's text, by their digests."""

_DOCUMENT_START = re.compile(rb"^(?=---(?:[ \t\r\n]|\Z))", re.MULTILINE)
_DIRECTIVE = re.compile(rb"^%", re.MULTILINE)
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


class _Trouble(Exception):
    """Something is wrong with a piece, so that the whole file has to be read."""


def read(file: str, text: bytes, known: Known) -> tuple[list[Object | Refused], Known]:
    """Everything a proxy can use in a file, what it cannot and why; and what is known now. Raises SyntaxProblem."""
    is_json = file.endswith(".json")
    pieces = _json_pieces(text) if is_json else _yaml_pieces(text)
    if len(pieces) > 1:
        try:
            found = _read_pieces(file, pieces, known, is_json=is_json)
        except (_Trouble, SyntaxProblem):
            pass
        else:
            return [each for objects in found.values() for each in objects], found
    return list(_objects(file, _documents(text, is_json=is_json))), {}


def _read_pieces(file: str, pieces: list[bytes], known: Known, *, is_json: bool) -> Known:
    found: dict[bytes, tuple[Object, ...]] = {}
    for piece in pieces:
        digest = hashlib.blake2b(piece, digest_size=16).digest()
        if digest in found:
            raise _Trouble  # an object that is there twice
        objects = known.get(digest)
        found[digest] = tuple(_sound(file, piece, is_json=is_json)) if objects is None else objects
    return found


def _sound(file: str, piece: bytes, *, is_json: bool) -> Iterator[Object]:
    for each in _objects(file, _documents(piece, is_json=is_json)):
        if isinstance(each, Refused):
            raise _Trouble
        yield each


def _yaml_pieces(text: bytes) -> list[bytes]:
    """The documents of a stream. A line that starts with `---` starts one, whatever it seems to stand in."""
    if text.startswith(_UTF16) or _DIRECTIVE.search(text):
        return [text]
    return _DOCUMENT_START.split(text)


def _json_pieces(text: bytes) -> list[bytes]:
    """A List for each item of a List, with all that is around the items; where that cannot be had, the whole text."""
    try:
        fields = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        items = msgspec.json.decode(fields["items"], type=list[msgspec.Raw])
    except (msgspec.MsgspecError, KeyError, UnicodeDecodeError, RecursionError):
        return [text]
    listing = bytes(fields["items"])
    if not items or not bytes(fields.get("kind", b"")).endswith(b'List"') or text.count(listing) != 1:
        return [text]
    before, after = text.split(listing)
    return [b"%b[%b]%b" % (before, item, after) for item in items]


def _documents(text: bytes, *, is_json: bool) -> list[Document]:
    return read_json(text) if is_json else read_yaml(text)


def _objects(file: str, documents: list[Document]) -> Iterator[Object | Refused]:
    for number, document in enumerate(documents, 1):
        if document.value is None and not document.problems:
            continue  # nothing but comments between two `---`
        where = file
        if len(documents) > 1:
            where += f" (document {number}, line {document.line})"
        for item in unpack(document.value):
            problems = document.problems_of(item)
            identity = identify(item)
            try:
                if problems and not is_other_kind(item):
                    raise ObjectError(where, str(identity or "object"), problems)
                found = decode(item, where, allow_loopback=True)
            except ObjectError as error:
                yield Refused(identity, str(error))
            else:
                if found is not None:
                    yield found
