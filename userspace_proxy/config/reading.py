"""From a command line, and the config file it names, to a Config or to every reason why there is none.

With --config, the file and its defaults have the place of all flags that it has fields for, as with kube-proxy; only
--hostname-override wins over its field. What the file has no field for is set by flags as ever.

Looked at on the host are the config file and whether manifests are there; whether an address can be bound shows when
it is.
"""

from __future__ import annotations

import enum
import typing
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from userspace_proxy.config import gates
from userspace_proxy.config.commandline import Given, read
from userspace_proxy.config.contradictions import contradictions
from userspace_proxy.config.flag import UNUSED
from userspace_proxy.config.kinds import server
from userspace_proxy.config.table import (
    FIELDS,
    FLAGS,
    HEALTHZ_PORT,
    HELP,
    KNOWN,
    METRICS_PORT,
    VERSION,
    Config,
    settings,
)
from userspace_proxy.config.values import Address
from userspace_proxy.exceptions import ConfigError
from userspace_proxy.files import open_regular

if typing.TYPE_CHECKING:
    from userspace_proxy.config.document import Document

Values = dict[str, typing.Any]
"""By the names of flags."""
_WINS = "hostname-override"


class Show(enum.Enum):
    """What a command line asks for instead of a running proxy."""

    HELP = enum.auto()
    VERSION = enum.auto()


def parse(argv: Sequence[str], *, look: bool = True) -> Config | Show:
    """Read a command line, without the program's name. Raises ConfigError that tells every problem there is.

    Without `look`, nothing is looked at on the host: what --config names is not read.
    """
    given, problems = read(argv, KNOWN)
    values, unusable = _values(given, problems)
    if values.get(HELP.name):
        return Show.HELP
    if values.get(VERSION.name):
        if problems:
            raise ConfigError(problems)
        return Show.VERSION
    notices: list[str] = []
    readable = True
    place = values.get("config") if look else None
    if place:
        document = _document(place)
        readable = not document.problems or bool(document.unusable)
        problems += document.problems
        unusable |= document.unusable
        notices += [*document.notices, *_not_looked_at(values, place)]
        values = _together(values, document.values)
    _deprecated_ports(given, values, unusable)
    config = Config(**{FIELDS[name]: value for name, value in values.items() if name in FIELDS})
    if readable:
        # What could not be read has its default here, which would be blamed for nothing.
        called = _called(given, place)
        problems += [problem for names, problem in contradictions(config, called) if unusable.isdisjoint(names)]
    if look and not config.cleanup and not config.write_config_to:
        problems += _missing(config.manifests)
    notices += _without_effect(config, {flag.name for flag, _ in given})
    if problems:
        raise ConfigError(problems, notices)
    return replace(config, notices=tuple(notices))


def _values(given: Iterable[Given], problems: list[str]) -> tuple[Values, set[str]]:
    """What the flags set, and which could not be read; why is added to `problems`."""
    values: Values = {}
    unusable = set()
    for flag, text in given:
        try:
            value = flag.kind.parse(text)
        except ValueError as why:
            problems.append(flag.problem(text, why))
            unusable.add(flag.name)
            continue
        values[flag.name] = values.get(flag.name, ()) + value if flag.kind.repeats else value
    return values, unusable


def _document(path: Path) -> Document:
    from userspace_proxy.config.document import Document, read_document  # here: YAML takes long to load

    try:
        with open_regular(path) as opened:
            return read_document(opened.read().decode(), str(path))
    except OSError as error:
        return Document(problems=[f"--config={str(path)!r}: {error.strerror}; name a file that can be read"])
    except UnicodeDecodeError as error:
        return Document(problems=[f"{path}: byte {error.start} is not UTF-8; allowed: YAML or JSON in UTF-8"])


def _together(flags: Values, file: Values) -> Values:
    """What is set with a config file: what has no field there is by flags."""
    values = {name: value for name, value in flags.items() if name not in FLAGS or not FLAGS[name].place}
    values |= file
    if flags.get(_WINS):
        values[_WINS] = flags[_WINS]
    if ":" in values.get("bind-address", ""):
        values.setdefault("healthz-bind-address", Address("::", 10256))
        values.setdefault("metrics-bind-address", Address("::1", 10249))
    return values


def _not_looked_at(values: Values, file: Path) -> Iterator[str]:
    for name in values:
        if name in FLAGS and FLAGS[name].place and name != _WINS:
            yield f"--{name} is not looked at, as --config is given; write {FLAGS[name].place} in {file}"
        elif name in (HEALTHZ_PORT.name, METRICS_PORT.name):
            yield f"--{name} is not looked at, as --config is given"


def _deprecated_ports(given: Sequence[Given], values: Values, unusable: set[str]) -> None:
    """--healthz-port and --metrics-port are the ports of addresses that come without."""
    for flag in (HEALTHZ_PORT, METRICS_PORT):
        name = flag.name.replace("-port", "-bind-address")
        if flag.name not in values or values.get("config") or name in unusable:
            continue
        port = values[flag.name]
        told = [text for other, text in given if other.name == name]
        host = told[-1] if told else getattr(Config(), FIELDS[name]).ip
        address = server(port or -1, "").parse(host)
        values[name] = address if address and address.port >= 0 else None


def _called(given: Sequence[Given], file: Path | None) -> typing.Callable[[str], str]:
    """How whoever set something calls it: by the flag, or by the place in the file."""
    by_flag = {flag.name for flag, _ in given if not file or not flag.place or flag.name == _WINS}

    def called(name: str) -> str:
        return f"{file}: {FLAGS[name].place}" if file and FLAGS[name].place and name not in by_flag else f"--{name}"

    return called


def _missing(manifests: Iterable[Path]) -> Iterator[str]:
    for path in manifests:
        try:
            path.stat()
        except OSError as error:
            yield f"--manifests={str(path)!r}: {error.strerror}; allowed: a file or a directory that is there; make it"


def _without_effect(config: Config, given: set[str]) -> Iterator[str]:
    """What was set and changes nothing, by the reason."""
    defaults = Config()
    by_reason = defaultdict(list)
    for flag, value in settings(config):
        differs = value != getattr(defaults, FIELDS[flag.name])
        if flag.group == UNUSED and (differs or (flag.name in given and not (config.config and flag.place))):
            by_reason[flag.help].append(flag.place if config.config and flag.place else f"--{flag.name}")
    for reason, names in by_reason.items():
        yield f"{', '.join(names)}: without effect; {reason}"
    if unused := gates.without_effect(config.feature_gates):
        yield f"feature gates {', '.join(unused)}: without effect; nothing here depends on them"
