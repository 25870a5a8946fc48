import msgspec
import pytest

from userspace_proxy.capture.messages import Ask, Cleanup, Close, Open, Replace, Reply, Withdraw
from userspace_proxy.model import IPFamily, Portal, PortalKind, Protocol, Redirect, ServicePortName

REDIRECT = Redirect(
    Portal(IPFamily.IPV6, Protocol.UDP, "fd00::a", 53, PortalKind.EXTERNAL_IP),
    20000,
    ServicePortName("kube-system", "dns", "dns"),
)


@pytest.mark.parametrize(
    "request_",
    [
        Open(IPFamily.IPV4, "0.0.0.0", ("10.0.0.0/8",), ("10.1.0.0/16",), use_library=True, take_over=True),
        Replace((REDIRECT,)),
        Withdraw(),
        Close(),
        Cleanup(IPFamily.IPV6),
    ],
)
def test_a_request_arrives_as_it_was_sent(request_):
    ask = Ask(7, request_)
    line = msgspec.json.encode(ask)
    assert b"\n" not in line
    assert msgspec.json.decode(line, type=Ask) == ask


def test_a_redirect_is_the_same_value_at_the_other_end():
    """Also in hash: sets of redirects are compared there."""
    arrived = msgspec.json.decode(msgspec.json.encode(Ask(1, Replace((REDIRECT,)))), type=Ask).request
    assert {*arrived.redirects} == {REDIRECT}
    assert isinstance(arrived.redirects[0].owner, ServicePortName)


def test_a_reply_is_empty_unless_something_is_to_be_said():
    assert msgspec.json.decode(b'{"number": 3}', type=Reply) == Reply(3)
