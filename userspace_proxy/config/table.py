"""All that can be set, in one value, `Config`, and the flags that set it.

Each field is declared with its flag in one of three places: `own` has what kube-proxy has not, `kubeproxy` what does
here what it does there, `unused` what is only taken. Parsing, the config file, /configz, completion, and the help text
and docs/configuration.md that `manual` writes are all drawn from there, so that they cannot disagree.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace

from userspace_proxy.config import gates
from userspace_proxy.config.flag import ADMIN, INSTEAD, Flag
from userspace_proxy.config.kinds import SWITCH, number
from userspace_proxy.config.kubeproxy import KubeProxySettings
from userspace_proxy.config.own import OwnSettings
from userspace_proxy.config.unused import UnusedSettings

AnyFlag = Flag[typing.Any]
API_VERSION = "kubeproxy.config.k8s.io/v1alpha1"
KIND = "KubeProxyConfiguration"


@dataclass(frozen=True)
class Config(UnusedSettings, KubeProxySettings, OwnSettings):
    """Everything that can be set, as `parse` validated it. Times are seconds."""

    notices: tuple[str, ...] = field(default=(), compare=False)
    """What whoever set this should know, a line each."""

    def is_on(self, gate: str) -> bool:
        """A feature gate."""
        return gates.is_on(self.feature_gates, gate)

    def configz(self) -> dict[str, object]:
        """As /configz shows it: as the config file has it, and what has no place there by the flags' names."""
        rest = {_camel(flag.name): flag.kind.as_json(value) for flag, value in settings(self) if not flag.place}
        return {"kubeproxy.config.k8s.io": as_document(self), "userspaceproxy.config": rest}


HELP = Flag("help", SWITCH, INSTEAD, "Print this text and exit; -h does too.")
VERSION = Flag(
    "version",
    replace(SWITCH, allowed="true, false or raw", parse=lambda text: text == "raw" or SWITCH.parse(text)),
    INSTEAD,
    "Print the version and exit.",
)
HEALTHZ_PORT = Flag(
    "healthz-port",
    number(0, 65535, 10256),
    ADMIN,
    "Deprecated: the port of --healthz-bind-address, where that has none; 0: no such server. Without --config only.",
)
METRICS_PORT = replace(
    HEALTHZ_PORT,
    name="metrics-port",
    kind=number(0, 65535, 10249),
    help=HEALTHZ_PORT.help.replace("healthz", "metrics"),
)
SPECIAL = (HEALTHZ_PORT, METRICS_PORT, VERSION, HELP)
"""Flags that set no field: they change another's, or what is done at all."""
FIELDS: Mapping[str, str] = {each.metadata["flag"].name: each.name for each in fields(Config) if each.metadata}
FLAGS: Mapping[str, AnyFlag] = {
    each.metadata["flag"].name: each.metadata["flag"] for each in fields(Config) if each.metadata
}
KNOWN: Mapping[str, AnyFlag] = {
    **{name: flag for name, flag in FLAGS.items() if not flag.in_file_only},
    **{flag.name: flag for flag in SPECIAL},
    "h": HELP,
}
"""What can stand on a command line."""


def settings(config: Config) -> Iterator[tuple[AnyFlag, typing.Any]]:
    """Every flag and its value."""
    for name, flag in FLAGS.items():
        yield flag, getattr(config, FIELDS[name])


def as_document(config: Config) -> dict[str, typing.Any]:
    """A KubeProxyConfiguration, as JSON has it."""
    document: dict[str, typing.Any] = {"apiVersion": API_VERSION, "kind": KIND}
    for flag, value in settings(config):
        if flag.place and (value or flag.kind.json is not dict):
            section, _, name = flag.place.rpartition(".")
            (document.setdefault(section, {}) if section else document)[name] = flag.kind.as_json(value)
    return document


def _camel(name: str) -> str:
    first, *others = name.split("-")
    return first + "".join(word.capitalize() for word in others)
