"""What a kubeconfig may hold, and what is said of the rest."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.sources.ways import access, write_kubeconfig
from userspace_proxy.exceptions import ConfigError
from userspace_proxy.sources import kubeconfig
from userspace_proxy.sources.credentials import Access


def problem(how: Access) -> str:
    with pytest.raises(ConfigError) as caught:
        kubeconfig.read(how.kubeconfig)
    return "\n".join(caught.value.problems)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"current-context": "nowhere"}, "found 'nowhere'; allowed: one of its contexts (elsewhere, here)"),
        ({"current-context": None, "contexts": None}, "one of its contexts (none)"),
        ({"clusters": []}, "cluster: found 'this'; allowed: one of its clusters (none)"),
        ({"users": []}, "user: found 'me'; allowed: one of its users (none)"),
        ({"clusters": [{"name": "this", "cluster": {"server": "192.0.2.1"}}]}, "server: found '192.0.2.1'"),
        (
            {"clusters": [{"name": "this", "cluster": {"server": "http://x", "proxy-url": "ftp://x"}}]},
            "proxy-url: found 'ftp://x'; allowed: http, https, socks5 or socks5h, then ://",
        ),
        (
            {
                "clusters": [
                    {
                        "name": "this",
                        "cluster": {"server": "https://x", "proxy-url": "socks5://x:1", "tls-server-name": "y"},
                    }
                ]
            },
            "tls-server-name",
        ),
    ],
)
def test_a_kubeconfig_that_leads_nowhere(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    file = write_kubeconfig(tmp_path / "config", "https://192.0.2.1:6443", {"token": "t"})
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert told in problem(access(file))


@pytest.mark.parametrize(("text", "told"), [("[1]", "not a mapping"), ("a: [}", "line 1"), ("", "not a mapping")])
def test_a_kubeconfig_that_is_none(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "config"
    file.write_text(text)
    assert told in problem(access(file))
    assert "No such file" in problem(access(tmp_path / "missing"))
    assert "null byte" in problem(Access("a\0b"))
    os.mkfifo(tmp_path / "fifo")
    assert "not a regular file" in problem(access(tmp_path / "fifo"))


@pytest.mark.parametrize(
    ("user", "told"),
    [
        ({"as": "system:kube-proxy"}, "as: found 'system:kube-proxy'; allowed: nothing"),
        ({"as": "x", "as-groups": ["a"]}, "as-groups: found ['a']; allowed: nothing"),
        ({"as-uid": "1"}, "as-uid: found '1'"),
        ({"as-user-extra": {"a": ["b"]}}, "as-user-extra: found"),
        ({"auth-provider": {"name": "azure"}}, "auth-provider: found 'azure'; allowed: oidc; for others"),
        ({"auth-provider": {}}, "auth-provider: found None; allowed: oidc"),
        ({"token": 5}, "user 'me': found Expected `str | null`, got `int` - at `$.token`"),
        ({"exec": {"command": "x"}}, "missing required field `apiVersion` - at `$.exec`"),
        ({"exec": {"command": "x", "apiVersion": "v1", "env": [{"name": "A"}]}}, "at `$.exec.env[0]`"),
    ],
)
def test_users_that_cannot_be_taken_at_their_word(tmp_path: Path, user: dict[str, Any], told: str) -> None:
    assert told in problem(access(write_kubeconfig(tmp_path / "config", "https://192.0.2.1", user)))


@pytest.mark.parametrize(
    ("server", "cluster", "told"),
    [
        ("https://me:secret@192.0.2.1", {}, "server: found a user in the URL; allowed: username and password"),
        ("https://[::1", {}, "server: found no URL (Invalid IPv6 URL)"),
        (f"https://{'a' * 70}.example", {}, "server: found no URL ("),
        ("https://x", {"proxy-url": "socks5://127.0.0.1:99999"}, "proxy-url: found no URL (Port out of range"),
        ("https://x", {"insecure-skip-tls-verify": "yes"}, "cluster 'this': found Expected `bool | null`, got `str`"),
    ],
)
def test_clusters_that_cannot_be_asked(tmp_path: Path, server: str, cluster: dict[str, Any], told: str) -> None:
    found = problem(access(write_kubeconfig(tmp_path / "config", server, {"token": "t"}, **cluster)))
    assert told in found
    assert "secret" not in found


def test_what_is_said_of_others_than_the_chosen_ones_does_not_matter(tmp_path: Path) -> None:
    file = write_kubeconfig(tmp_path / "config", "https://192.0.2.1/", {"token": "t", "tokenFile": "a/b"})
    content = json.loads(file.read_text())
    for kind in ("contexts", "clusters", "users"):
        content[kind] += [5, None, {"name": "odd"}, {"name": ["odd"], kind[:-1]: 5}]
    file.write_text(json.dumps(content))
    found = kubeconfig.read(str(file))
    assert found.server == "https://192.0.2.1"
    assert found.files == [str(file), str(tmp_path / "a/b")]


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield from _places(inner, (*path, key))


ODD = (None, True, 5, 1.5, "", "x", "\0", "https://[::1", [], {}, [1], ["a"], {"a": 1}, "\u2028", "a" * 70)


def test_whatever_is_in_it_is_usable_or_told(tmp_path: Path) -> None:
    """Each place in it holding each odd value, and each beginning of the text: a file that is being written."""
    user = {"token": "t", "tokenFile": "t", "exec": {"command": "c", "apiVersion": "v1", "args": ["a"], "env": []}}
    file = write_kubeconfig(tmp_path / "config", "https://127.0.0.1:1", user, **{"proxy-url": "http://127.0.0.1:2"})
    content = json.loads(file.read_text())
    texts = [yaml.safe_dump(content, sort_keys=False)[:size] for size in range(900)]
    for place in _places(content):
        for odd in ODD:
            changed = copy.deepcopy(content)
            inner = changed
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = odd
            texts.append(json.dumps(changed))
    for text in texts:
        file.write_text(text)
        with suppress(ConfigError):
            kubeconfig.read(str(file))
