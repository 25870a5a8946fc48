"""Messages put together and taken apart, against the kernel."""

from __future__ import annotations

import errno
import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from userspace_proxy.capture.netlink import ACK, CREATE, EXCLUSIVE, Netlink, attribute, attributes, message

LINKS, LINK, NAME = 18, 16, 3
"""RTM_GETLINK, RTM_NEWLINK, IFLA_IFNAME"""


@given(st.lists(st.tuples(st.integers(1, 0x3FFF), st.binary(max_size=70))))
def test_attributes_are_read_as_written(given):
    assert list(attributes(b"".join(attribute(*each) for each in given))) == given


def test_a_dump_tells_everything():
    netlink = Netlink("links", 0)
    found = list(netlink.dump(LINKS, struct.pack("=BxHiII", 0, 0, 0, 0, 0)))
    netlink.close()
    assert {kind for kind, _ in found} == {LINK}
    assert b"lo\0" in {dict(attributes(body[16:]))[NAME] for _, body in found}


@pytest.mark.privileged
def test_each_change_of_a_batch_has_its_own_answer(node):
    """Of 200 routes every third is there already, and the last leads nowhere."""

    def route(number: int, interface: int) -> bytes:
        start = struct.pack("=BBBBBBBBI", socket.AF_INET, 32, 0, 0, 254, 117, 253, 1, 0)
        destination = attribute(1, socket.inet_aton(f"10.96.0.{number}"))
        return message(24, ACK | CREATE | EXCLUSIVE, start + destination + attribute(4, struct.pack("=I", interface)))

    with node.entered():
        netlink = Netlink("routes", 0)
        assert set(netlink.change([route(number, 1) for number in range(1, 201, 3)])) == {0}
        codes = netlink.change([*(route(number, 1) for number in range(1, 201)), route(201, 99)])
        netlink.close()
    assert codes == [errno.EEXIST if number % 3 == 1 else 0 for number in range(1, 201)] + [errno.ENODEV]
    assert len(node.run("ip route show proto 117").splitlines()) == 200


@pytest.mark.privileged
def test_a_refusal_names_who_asked(node):
    with node.entered():
        netlink = Netlink("somebody", 12)
        with pytest.raises(OSError, match="somebody over netlink"):
            list(netlink.dump(0xFF01, bytes(4)))
        netlink.close()
