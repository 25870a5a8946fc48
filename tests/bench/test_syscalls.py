"""How strace's summary is read and told."""

from __future__ import annotations

from bench.syscalls import counts, table


def test_calls_are_counted_by_name_and_those_that_failed_beside_them():
    summary = """% time     seconds  usecs/call     calls    errors syscall
------ ----------- ----------- --------- --------- ----------------
 41.00    0.021000          10      2000           sendto
 20.10    0.010000           5      2000      1000 accept4
------ ----------- ----------- --------- --------- ----------------
100.00    0.051000           7      4000      1000 total
"""
    assert counts(summary) == {"sendto": 2000, "accept4": 2000, "accept4 that failed": 1000}


def test_rare_calls_are_left_out_and_those_that_failed_are_not_counted_twice():
    columns = {"ours": {"sendto": 2.0, "accept4": 2.0, "accept4 that failed": 1.0, "getpid": 0.001}, "theirs": {}}
    lines = table(columns).splitlines()
    assert [line.split("  ")[0] for line in lines[1:]] == ["accept4", "accept4 that failed", "sendto", "all"]
    assert lines[-1].split() == ["all", "4.00", "-"]
