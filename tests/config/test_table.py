"""All that can be set, together."""

from __future__ import annotations

import dataclasses
import json

import pytest

from tests.config.flags import M, problem
from userspace_proxy.config import Config, parse, settings
from userspace_proxy.config.flag import GROUPS
from userspace_proxy.config.table import FLAGS, KNOWN, SPECIAL, as_document


def test_it_is_a_value_that_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().splice = False
    assert hash(parse([M])) == hash(parse([M]))


def test_what_was_said_about_it_makes_no_difference():
    assert parse([M, "--masquerade-all=false"]) == parse([M])


def test_each_default_can_be_written_as_it_is_shown():
    for flag, value in settings(Config()):
        if flag.name != "manifests":
            assert flag.kind.parse(flag.kind.show(value)) == value, flag.name


def test_every_flag_has_a_name_and_a_place_of_its_own_and_a_group():
    every = [*FLAGS.values(), *SPECIAL]
    assert len({flag.name for flag in every}) == len(every)
    places = [flag.place for flag in every if flag.place]
    assert len(set(places)) == len(places)
    assert {flag.group for flag in every} == set(GROUPS)
    assert not any("." in name for name in KNOWN)


@pytest.mark.parametrize("text", ["true", "false", "raw", "maybe"])
def test_what_sets_no_field(text):
    if text == "maybe":
        assert problem(M, "--version=maybe").startswith("--version='maybe': neither true nor false; allowed: ")
        assert problem(M, "--help=me").startswith("--help='me': neither true nor false; allowed: ")
    else:
        assert (parse([M, f"--version={text}"]) == parse([M])) is (text == "false")


def test_configz_is_the_config_file_and_what_has_no_place_there():
    config = parse([M, "--proxy-port-range=10+5", "--nodeport-addresses=::/0", "-v3", "--healthz-bind-address="])
    shown = json.loads(json.dumps(config.configz()))
    assert set(shown) == {"kubeproxy.config.k8s.io", "userspaceproxy.config"}
    file = shown["kubeproxy.config.k8s.io"]
    assert file == as_document(config)
    assert file["portRange"] == "10-15"
    assert file["nodePortAddresses"] == ["::/0"]
    assert file["healthzBindAddress"] == ""
    rest = shown["userspaceproxy.config"]
    wanted = {"manifests": ["/"], "stateDir": "", "maxUdpFlows": 4096, "drainTimeout": "5s", "splice": True, "v": 3}
    assert {name: rest[name] for name in wanted} == wanted
    assert len(rest) == len([flag for flag in FLAGS.values() if not flag.place])


def test_feature_gates_are_asked_by_name():
    config = parse([M, "--feature-gates=AllBeta=false,SCTPSupport=true"])
    assert config.is_on("SCTPSupport")
    assert not config.is_on("TopologyAwareHints")
