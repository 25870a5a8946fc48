"""Feature gates: how they are written, and what is on."""

from __future__ import annotations

import pytest

from userspace_proxy.config.gates import IN_USE, STAGES, Stage, is_on, parse_gates, show_gates, without_effect


@pytest.mark.parametrize(
    ("text", "gates"),
    [
        ("", ()),
        ("SCTPSupport=true", (("SCTPSupport", True),)),
        (" SCTPSupport = F , AllBeta=1,", (("SCTPSupport", False), ("AllBeta", True))),
        ("AllAlpha=true,AllAlpha=false", (("AllAlpha", True), ("AllAlpha", False))),
    ],
)
def test_reading(text, gates):
    assert parse_gates(text) == gates
    assert dict(parse_gates(show_gates(gates))) == dict(gates)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("SCTPSupport", "'SCTPSupport' has no '='"),
        ("SCTPSupport=", "'SCTPSupport=' is neither true nor false"),
        ("SCTPSupport=on", "'SCTPSupport=on' is neither true nor false"),
        ("sctpsupport=true", "there is no feature gate 'sctpsupport'"),
        ("Allalpha=true", "there is no feature gate 'Allalpha'; did you mean AllAlpha?"),
    ],
)
def test_what_is_refused(text, why):
    with pytest.raises(ValueError) as caught:
        parse_gates(text)
    assert str(caught.value).startswith(why)


@pytest.mark.parametrize(
    ("gates", "name", "on"),
    [
        ("", "SCTPSupport", True),
        ("", "ServiceTopology", False),
        ("", "CSIMigrationRBD", False),
        ("SCTPSupport=false", "SCTPSupport", False),
        ("SCTPSupport=false,SCTPSupport=true", "SCTPSupport", True),
        ("AllBeta=false", "SCTPSupport", False),
        ("AllBeta=false", "ServiceTopology", False),
        ("SCTPSupport=true,AllBeta=false", "SCTPSupport", True),
        ("AllAlpha=true", "ServiceTopology", True),
        ("AllAlpha=true", "SCTPSupport", True),
        ("AllAlpha=true,ServiceTopology=false", "ServiceTopology", False),
    ],
)
def test_what_is_on(gates, name, on):
    assert is_on(parse_gates(gates), name) is on


def test_each_gate_is_known_once_at_its_stage():
    assert STAGES["SCTPSupport"] is Stage.BETA
    assert STAGES["ServiceTopology"] is Stage.ALPHA
    assert set(IN_USE) <= set(STAGES)
    assert {"EndpointSliceProxying", "ServiceInternalTrafficPolicy", "ProxyTerminatingEndpoints"} <= set(STAGES)
    assert not {"AllAlpha", "AllBeta"} & set(STAGES)


def test_what_makes_no_difference_is_told():
    assert without_effect(parse_gates("ServiceTopology=true,AppArmor=true,CPUManager=false,AllBeta=false")) == [
        "ServiceTopology",
        "CPUManager",
    ]
