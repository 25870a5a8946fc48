"""The service ports as a table for people, what is wrong with them, and a line to try the first one with.

Made from the rows of `proxier.Proxier.report`; the same rows are JSON at /services.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

_NO_ENDPOINTS = {
    "refusing": "none: clients are refused",
    "silent": "none on this node: clients hear nothing",
    "down": "not served, see below",
}
_HEADINGS = ("SERVICE PORT", "ADDRESS", "EXTERNAL", "NODE PORT", "PROXY PORT", "ENDPOINTS")


def render(rows: Sequence[Row], *, captured: bool) -> str:
    """The table, and below it what to paste. `captured`: whether the services' own addresses lead here."""
    lines = [_HEADINGS, *(_cells(row) for row in rows)]
    left_out = set() if captured else {"EXTERNAL", "NODE PORT"}  # nothing comes from there
    if not any(row["externalIPs"] for row in rows):
        left_out.add("EXTERNAL")
    keep = [n for n, heading in enumerate(_HEADINGS) if heading not in left_out]
    widths = {n: max(len(line[n]) for line in lines) for n in keep}
    text = "\n".join("  ".join(line[n].ljust(widths[n]) for n in keep).rstrip() for line in lines)
    if not rows:
        return "no service ports yet; they are served as soon as they appear in the manifests"
    return "\n".join(filter(None, (text, _problems(rows), _try_line(rows, captured=captured))))


def _name(row: Row) -> str:
    return f"{row['namespace']}/{row['name']}" + (f":{row['port']}" if row["port"] else "")


def _cells(row: Row) -> tuple[str, ...]:
    return (
        _name(row) + (f" ({row['scope']})" if row["scope"] else ""),
        ", ".join(f"{address}/{row['protocol']}" for address in row["clusterIPs"]),
        ", ".join(row["externalIPs"]),
        str(row["nodePort"] or ""),
        str(row["proxyPort"] or "-"),
        ", ".join(row["endpoints"]) or _NO_ENDPOINTS.get(row["state"], ""),
    )


def _problems(rows: Sequence[Row]) -> str:
    """A line each; the rows of a service port, one for each family and scope, may have them in common."""
    lines = dict.fromkeys(f"    {_name(row)}: {problem}" for row in rows for problem in row["problems"])
    return "\n".join(("\nProblems:\n", *lines)) if lines else ""


def _try_line(rows: Sequence[Row], *, captured: bool) -> str:
    """A command that gets an answer, from a service port that looks like HTTP and shows round robin if there is one."""
    web = [
        row
        for row in rows
        if row["endpoints"]
        and row["clusterIPs"]
        and row["protocol"] == "TCP"
        and (row["port"].startswith("http") or row["clusterIPs"][0].endswith(":80"))
    ]
    if not web:
        return ""
    row = min(web, key=lambda row: (bool(row["problems"]), row["affinity"] != "None", -len(row["endpoints"])))
    local = "127.0.0.1" if row["family"] == "IPv4" else "[::1]"
    own = captured and not row["problems"]
    place = row["clusterIPs"][0].removesuffix(":80") if own else f"{local}:{row['proxyPort']}"
    return f"\nTry it from another terminal:\n\n    curl http://{place}/\n"
