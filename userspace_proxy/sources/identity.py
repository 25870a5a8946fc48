"""Which object a parsed value is: its kind, namespace and name, and the objects that a List holds.

A value may be anything, and is read as far as it goes, so that even of an object that will be refused it can be told
which it was. What is in an object is read in `sources.objects`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

API_VERSIONS = {"Service": "v1", "Endpoints": "v1", "EndpointSlice": "discovery.k8s.io/v1"}
LISTS = {"List": "", **{f"{kind}List": kind for kind in API_VERSIONS}}
"""Kinds that hold others, and the kind of their items where that is settled by the list's own."""
_MEANT = {kind.lower(): kind for kind in (*API_VERSIONS, *LISTS)}


class Identity(NamedTuple):
    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}"


def unpack(value: object) -> Iterator[object]:
    """The object itself, or those of a List. Items of a typed list (ServiceList) need not repeat their kind."""
    items = value.get("items") if isinstance(value, dict) and kind_of(value) in LISTS else None
    if not isinstance(value, dict) or not isinstance(items, list):
        yield value
        return
    kind = LISTS[kind_of(value)]
    for item in items:
        if kind and isinstance(item, dict) and item.get("kind") is None and item.get("apiVersion") is None:
            item.update(kind=kind, apiVersion=API_VERSIONS[kind])
        yield item


def identify(value: object) -> Identity | None:
    """Whom a value speaks of, as far as it can be told even of one that will be refused."""
    kind = misspelt(value) or kind_of(value)
    if not isinstance(value, dict) or kind not in API_VERSIONS:
        return None
    metadata = value.get("metadata")
    if not isinstance(metadata, dict) or not isinstance(metadata.get("name"), str):
        return None
    namespace = metadata.get("namespace") or "default"
    return Identity(kind, namespace, metadata["name"]) if isinstance(namespace, str) else None


def is_other_kind(value: object) -> bool:
    """Whether this is a whole object of a kind that says nothing to a proxy: a Deployment, a Knative Service."""
    if not isinstance(value, dict) or not isinstance(value.get("apiVersion"), str):
        return False
    kind = kind_of(value)
    if kind in API_VERSIONS:
        return bool(_group(value["apiVersion"]) != _group(API_VERSIONS[kind]))
    return bool(kind) and kind not in LISTS and not misspelt(value)


def misspelt(value: object) -> str:
    """The kind that was meant, where one of ours has letters of the wrong case; Kubernetes would not know it."""
    kind = kind_of(value)
    meant = _MEANT.get(kind.lower(), "")
    if not isinstance(value, dict) or meant in ("", kind):
        return ""
    ours = API_VERSIONS.get(meant.removesuffix("List"), "v1")
    return meant if _group(value.get("apiVersion")) == _group(ours) else ""


def kind_of(value: object) -> str:
    kind = value.get("kind") if isinstance(value, dict) else None
    return kind if isinstance(kind, str) else ""


def _group(api_version: object) -> str:
    group, slash, _ = str(api_version).partition("/")
    return group.lower() if slash else ""
