"""Kubernetes objects are read here: Service, EndpointSlice and Endpoints, decoded, validated, turned into model values.

An object comes as a parsed value (dicts, lists, text, numbers); where it was found and how it was parsed is the
caller's business, what is done with several of them is in `sources.store`. Fields that do not matter to a proxy are
never looked at. Everything that does matter is untrusted: an object is taken whole or refused whole, with one
ObjectError that tells all its problems, each as `field: found X; allowed: Y`. A status is not the writer's own: what is
wrong in it is told and passed over.

Which object a value is tells `sources.identity`; the shapes of the kinds are in `sources.shapes`, and what their fields
mean in `sources.services` and `sources.endpoints`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from userspace_proxy.exceptions import ObjectError
from userspace_proxy.sources.checks import Check, show
from userspace_proxy.sources.endpoints import EndpointSet, read_endpoints, read_slice
from userspace_proxy.sources.identity import API_VERSIONS, LISTS, Identity, identify, is_other_kind, kind_of, misspelt
from userspace_proxy.sources.services import Service, read_service
from userspace_proxy.sources.shapes import EndpointSliceShape, EndpointsShape, Metadata, ObjectShape, ServiceShape

logger = logging.getLogger(__name__)

NOT_OURS = ("service.kubernetes.io/service-proxy-name", "service.kubernetes.io/headless")
"""Labels that, with any value, take an object away from the node's default proxy."""

_SHAPES: Mapping[str, type[ObjectShape]] = {
    "Service": ServiceShape,
    "Endpoints": EndpointsShape,
    "EndpointSlice": EndpointSliceShape,
}


def decode(value: object, where: str, *, allow_loopback: bool = False) -> Service | EndpointSet | None:
    """Read one object. None: there is nothing to proxy in it (another kind, headless, ExternalName, not ours).

    Loopback endpoints are for manifests of a machine's own; from a cluster they would lead into the node.

    Raises ObjectError.
    """
    identity = identify(value)
    kind = kind_of(value)
    if is_other_kind(value):
        logger.debug("%s: %s: no Service, EndpointSlice or Endpoints; skipped", where, kind)
        return None
    check = Check(allow_loopback)
    if kind not in API_VERSIONS or not isinstance(value, dict):
        raise ObjectError(where, str(identity or kind or "object"), [_unknown(value)])
    if value.get("apiVersion") != API_VERSIONS[kind]:
        check.refuse("apiVersion", value.get("apiVersion"), API_VERSIONS[kind])
    decoded, misshapen = _shaped(value, _SHAPES[kind])
    labels = (decoded.metadata and decoded.metadata.labels) or {}
    if any(label in labels for label in NOT_OURS):
        logger.debug("%s: %s: labelled for another proxy or headless; skipped", where, identity or kind)
        return None
    found = _read(decoded, kind, labels, check)
    for path in [path for path in misshapen if path.partition(".")[0] == "status"]:
        check.passed_over.append(misshapen.pop(path))
    for told in check.passed_over:
        logger.warning("%s: %s: %s; it is passed over, and the rest served", where, identity or kind, told)
    # What has not its shape was read as nothing, and people should hear of it once.
    known = tuple(f"{path}{next_}" for path in misshapen for next_ in ":.[")
    others = [problem for problem in check.problems if not problem.startswith(known)]
    if misshapen or others:
        raise ObjectError(where, str(identity or kind), [*misshapen.values(), *others])
    for remark in check.remarks:
        logger.info("%s: %s", identity, remark)
    return found


def _read(decoded: ObjectShape, kind: str, labels: Mapping[Any, Any], check: Check) -> Service | EndpointSet | None:
    metadata = decoded.metadata or Metadata()
    namespace = "default" if metadata.namespace in (None, "") else metadata.namespace
    name = check.name("metadata.name", metadata.name, dotted=kind != "Service")
    identity = Identity(kind, check.name("metadata.namespace", namespace), name)
    if isinstance(decoded, ServiceShape):
        return read_service(decoded, identity, check)
    if isinstance(decoded, EndpointSliceShape):
        return read_slice(decoded, identity, labels, check)
    assert isinstance(decoded, EndpointsShape)
    return read_endpoints(decoded, identity, check)


def _unknown(value: object) -> str:
    if not isinstance(value, dict):
        return f"found {show(value)}; allowed: an object with apiVersion, kind and metadata"
    if meant := misspelt(value):
        return f"kind: found {show(kind_of(value))}; allowed: {meant}, in this very case"
    if kind_of(value) in LISTS:
        return f"items: found {show(value.get('items'))}; allowed: a list of objects, not of Lists"
    field = "apiVersion" if kind_of(value) else "kind"
    return f"{field}: found {show(value.get(field))}; allowed: what every Kubernetes object says of itself"


def _shaped(value: Any, struct: type[ObjectShape]) -> tuple[ObjectShape, dict[str, str]]:
    """The struct, without the parts of the value that have not their shape, and what is said of each of these."""
    problems: dict[str, str] = {}
    while True:
        try:
            return msgspec.convert(value, struct), problems
        except msgspec.ValidationError as error:
            match = re.fullmatch(r"Expected `(.+?)`, got `(.+?)` - at `\$\.(.+)`", str(error))
            if match is None or match[3] in problems:
                raise
            expected, got, path = match.groups()
            words = expected.replace("array", "a list").replace("object", "a mapping").replace(" | null", "")
            problems[path] = f"{path}: found {got}; allowed: {words}"
            value = _blanked(value, re.findall(r"\w+", path))


def _blanked(value: Any, path: Sequence[str]) -> Any:
    """A copy with nothing at the end of the path; in a list, which has no room for nothing, an empty object."""
    if not path:
        return None
    step, *rest = path
    if isinstance(value, dict):
        return {**value, step: _blanked(value[step], rest)}
    at = int(step)
    inside = _blanked(value[at], rest)
    return [*value[:at], {} if inside is None else inside, *value[at + 1 :]]
