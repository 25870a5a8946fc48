from __future__ import annotations

from typing import Any

from userspace_proxy.table import render


def row(name: str, **more: Any) -> dict[str, Any]:
    return {
        "namespace": "default",
        "name": name,
        "port": "",
        "family": "IPv4",
        "scope": "",
        "protocol": "TCP",
        "clusterIPs": ["127.96.0.10:80"],
        "externalIPs": [],
        "nodePort": 0,
        "proxyPort": 40001,
        "affinity": "None",
        "endpoints": ["127.0.0.1:8081"],
        "state": "serving",
        "problems": [],
    } | more


def test_columns_are_aligned_and_empty_ones_left_out() -> None:
    table = render([row("a", nodePort=30080), row("much-longer")], captured=True).splitlines()
    assert table[0].split("  ")[0] == "SERVICE PORT"
    assert "EXTERNAL" not in table[0]
    assert table[1].index("127.96.0.10:80/TCP") == table[2].index("127.96.0.10:80/TCP") == table[0].index("ADDRESS")
    assert "30080" in table[1]


def test_external_addresses_get_a_column() -> None:
    assert "192.0.2.1:80" in render([row("a", externalIPs=["192.0.2.1:80"])], captured=True)


def test_without_capture_nothing_is_told_of_addresses_that_lead_nowhere() -> None:
    text = render([row("a", externalIPs=["192.0.2.1:80"], nodePort=30080)], captured=False)
    assert "192.0.2.1" not in text
    assert "30080" not in text
    assert "NODE PORT" not in text


def test_states_stand_where_endpoints_would_and_troubles_below() -> None:
    trouble = "10.96.0.1:80/TCP cannot be had: " + 200 * "why "
    text = render(
        [
            row("none", endpoints=[], state="refusing"),
            row("bad", endpoints=[], state="down", proxyPort=0, problems=["no proxy port"]),
            row("part", port="http", endpoints=["10.1.0.2:80", "10.1.0.3:80"], problems=[trouble, "another"]),
            row("part", port="http", scope="local endpoints", endpoints=[], state="silent", problems=[trouble]),
            row("refused", endpoints=[], state="refusing", problems=["a third"]),
        ],
        captured=True,
    )
    table, title, problems, _ = text.split("\n\n", 3)
    assert [line.split("  ")[-1].strip() for line in table.splitlines()] == [
        "ENDPOINTS",
        "none: clients are refused",
        "not served, see below",
        "10.1.0.2:80, 10.1.0.3:80",
        "none on this node: clients hear nothing",
        "none: clients are refused",
    ]
    assert title == "Problems:"
    assert [line.strip() for line in problems.splitlines()] == [
        "default/bad: no proxy port",
        f"default/part:http: {trouble.strip()}",
        "default/part:http: another",
        "default/refused: a third",
    ]
    assert "Problems" not in render([row("a")], captured=True)


def test_the_line_to_paste_shows_round_robin_where_there_is_one() -> None:
    rows = [
        row("sticky", affinity="ClientIP", clusterIPs=["127.96.0.1:80"], endpoints=["a:1", "b:2", "c:3"]),
        row("one", clusterIPs=["127.96.0.2:80"]),
        row("two", clusterIPs=["127.96.0.3:8080"], port="http", endpoints=["a:1", "b:2"]),
    ]
    assert "curl http://127.96.0.3:8080/\n" in render(rows, captured=True)
    assert "curl http://127.96.0.2/\n" in render(rows[:2], captured=True)


def test_without_capture_the_proxy_port_is_named() -> None:
    assert "curl http://127.0.0.1:40001/\n" in render([row("a")], captured=False)
    assert "curl http://[::1]:40001/\n" in render(
        [row("a", family="IPv6", clusterIPs=["[fd00::1]:80"])], captured=False
    )


def test_nothing_to_try_where_nothing_speaks_http() -> None:
    assert "curl" not in render([row("a", protocol="UDP"), row("b", endpoints=[])], captured=True)


def test_no_service_ports_at_all() -> None:
    assert "no service ports yet" in render([], captured=True)


def test_a_scope_is_named_and_silence_is_told() -> None:
    rows = [row("a"), row("a", scope="local endpoints", endpoints=[], state="silent")]
    text = render(rows, captured=True)
    assert "default/a (local endpoints)" in text
    assert "none on this node: clients hear nothing" in text
