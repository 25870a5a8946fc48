"""The real files, the real watch, on both loops."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import time
from pathlib import Path

import pytest

from userspace_proxy.exceptions import ConfigError
from userspace_proxy.model import ServicePortName
from userspace_proxy.sources import manifests
from userspace_proxy.sources.manifests import ManifestSource

EXAMPLES = Path(__file__).parent.parent.parent / "examples" / "manifests"
PATIENCE = 10


def service(name="web", ip="127.96.0.1"):
    return f"""\
apiVersion: v1
kind: Service
metadata: {{name: {name}}}
spec:
  clusterIP: {ip}
  ports: [{{port: 80}}]
"""


class Watched:
    """A source that runs, and what it has published."""

    def __init__(self, *paths):
        self.source = ManifestSource(paths)
        self.published = []
        self._news = asyncio.Event()

    def _publish(self, snapshot):
        self.published.append(snapshot)
        self._news.set()

    @contextlib.asynccontextmanager
    async def running(self):
        task = asyncio.get_running_loop().create_task(self.source.run(self._publish))
        try:
            await self.until(lambda _: True, task)
            yield self
        finally:
            task.cancel()
            done, _ = await asyncio.wait([task], timeout=PATIENCE)
            assert done, "the source does not end"
            if not task.cancelled():
                task.result()

    async def until(self, condition, task=None):
        """Wait for a published snapshot; returns the seconds that took."""
        start = time.monotonic()
        while not (self.published and condition(self.published[-1])):
            if task is not None and task.done():
                task.result()
            assert time.monotonic() - start < PATIENCE, self.published[-1:]
            self._news.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.05):
                    await self._news.wait()
        return time.monotonic() - start

    async def until_ips(self, *ips):
        return await self.until(lambda snapshot: ips_of(snapshot) == sorted(ips))

    async def until_problem(self, text):
        """Problems are not published; that is why this looks for them."""
        for _ in range(PATIENCE * 200):
            if any(text in problem for problem in self.source.problems):
                return
            await asyncio.sleep(0.005)
        raise AssertionError(f"{text!r} is not among {self.source.problems}")


def ips_of(snapshot):
    return sorted(port.cluster_ips[0] for port in snapshot.services.values())


def read_once(run, *paths):
    async def main():
        async with Watched(*paths).running() as watched:
            return watched.published[-1], watched.source.problems

    return run(main())


def scenario(run, *paths):
    """Run the decorated coroutine with a source on `paths`."""

    def decorate(steps):
        async def main():
            async with Watched(*paths).running() as watched:
                await steps(watched)

        run(main())

    return decorate


def test_the_examples(run):
    snapshot, problems = read_once(run, EXAMPLES)
    assert problems == ()
    seen = {
        str(name): (port.protocol.value, f"{port.cluster_ips[0]}:{port.port}", port.node_port, port.affinity.value)
        for name, port in snapshot.services.items()
    }
    assert seen == {
        "default/web:http": ("TCP", "127.96.0.10:80", 30080, "None"),
        "default/sticky:http": ("TCP", "127.96.0.11:80", 0, "ClientIP"),
        "default/echo": ("UDP", "127.96.0.12:7", 0, "None"),
        "default/multi:tcp": ("TCP", "127.96.0.13:7000", 0, "None"),
        "default/multi:udp": ("UDP", "127.96.0.13:7000", 0, "None"),
        "default/empty:http": ("TCP", "127.96.0.14:80", 0, "None"),
    }
    assert {str(name): [e.port for e in found] for name, found in snapshot.endpoints.items()} == {
        "default/web:http": [8081, 8082],
        "default/sticky:http": [8081, 8082],
        "default/echo": [8083, 8084],
        "default/multi:tcp": [8081],
        "default/multi:udp": [8083],
    }


BAD = {
    "a key twice": (
        "metadata: {name: web}",
        "metadata: {name: web}\nkind: Service",
        "found the key 'kind' twice; allowed: once",
    ),
    "a key that is no text": ("metadata: {name: web}", "metadata: {name: web, 5: x}", "found the key 5; allowed: text"),
    "a boolean for a name": ("name: web", "name: yes", "metadata.name: found true; allowed: text; put it in quotes"),
    "a number for a name": ("name: web", "name: 8080", "metadata.name: found 8080; allowed: text; put it in quotes"),
    "a name in capitals": ("name: web", "name: Web", "metadata.name: found 'Web'; allowed: lower-case letters"),
    "no name": ("name: web", "labels: {}", "metadata.name: found nothing; allowed: text"),
    "no apiVersion": ("apiVersion: v1", "x: y", "apiVersion: found nothing; allowed: v1"),
    "a misspelt apiVersion": ("apiVersion: v1", "apiVersion: v11", "apiVersion: found 'v11'; allowed: v1"),
    "no kind": ("kind: Service", "x: y", "kind: found nothing"),
    "a port as text": ("port: 80", 'port: "80"', "spec.ports[0].port: found '80'; allowed: a number from 1 to 65535"),
    "a port too high": ("port: 80", "port: 65536", "spec.ports[0].port: found 65536"),
    "an unknown protocol": ("port: 80", "port: 80, protocol: ICMP", "allowed: TCP, UDP, SCTP"),
    "no ports": ("[{port: 80}]", "[]", "spec.ports: found nothing; allowed: at least one port"),
    "ports as a mapping": ("[{port: 80}]", "{port: 80}", "spec.ports: found object; allowed: a list"),
    "two ports unnamed": ("[{port: 80}]", "[{port: 80}, {port: 81}]", "allowed: a name, as there are several ports"),
    "a name for an address": ("127.96.0.1", "localhost", "spec.clusterIP: found 'localhost'; allowed: an IPv4"),
    "a number for an address": ("127.96.0.1", "127", "spec.clusterIP: found 127; allowed: an IPv4 or IPv6 address"),
    "everywhere": ("127.96.0.1", "0.0.0.0", "not unspecified, multicast or broadcast"),
    "three cluster IPs": (
        "clusterIP: 127.96.0.1",
        "clusterIPs: [10.0.0.1, 'fd00::1', 'fd00::2']",
        "one of each family",
    ),
    "an affinity timeout of 0": (
        "clusterIP: 127.96.0.1",
        "clusterIP: 127.96.0.1\n  sessionAffinityConfig: {clientIP: {timeoutSeconds: 0}}",
        "timeoutSeconds: found 0; allowed: a number from 1 to 86400",
    ),
    "a tag of Python's": ("127.96.0.1", "!!python/name:os.system x", "found the tag"),
    "an alias of nothing": ("127.96.0.1", "*ip", "found the alias *ip"),
    "a spec as text": ("spec:", "spec: x\nrest:", "spec: found str; allowed: a mapping"),
}


@pytest.mark.parametrize("as_list", [False, True], ids=["documents", "List"])
@pytest.mark.parametrize("bad", BAD)
def test_what_is_refused_is_told_and_the_others_are_served(bad, as_list, tmp_path):
    old, new, problem = BAD[bad]
    texts = [service("before", "127.96.1.1"), service().replace(old, new, 1), service("after", "127.96.1.2")]
    assert texts[1] != service()
    if as_list:
        items = "".join("- " + text.replace("\n", "\n  ").rstrip() + "\n" for text in texts)
        text = f"apiVersion: v1\nkind: List\nitems:\n{items}"
    else:
        text = "---\n".join(texts)
    (tmp_path / "a.yaml").write_text(text)
    snapshot, problems = read_once(asyncio.run, tmp_path)
    assert ips_of(snapshot) == ["127.96.1.1", "127.96.1.2"]
    (found,) = problems
    assert problem in found
    assert found.startswith(f"{tmp_path}/a.yaml")
    assert as_list or "(document 2, line 7)" in found


def test_other_kinds_and_empty_documents_are_skipped(tmp_path):
    (tmp_path / "a.yaml").write_text("---\n# nothing\n---\napiVersion: apps/v1\nkind: Deployment\n---\n" + service())
    snapshot, problems = read_once(asyncio.run, tmp_path)
    assert (ips_of(snapshot), problems) == (["127.96.0.1"], ())


def test_which_files_of_a_directory_count(tmp_path):
    for number, name in enumerate(
        ["a.yaml", "b.yml", ".c.yaml", "#d.yaml", "e.yaml~", ".#f.yaml", "g.txt", "h.yaml.swp"]
    ):
        (tmp_path / name).write_text(service(f"s{number}", f"127.96.0.{number + 1}"))
    value = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "j"}}
    (tmp_path / "j.json").write_text(
        json.dumps({**value, "spec": {"clusterIP": "127.96.0.99", "ports": [{"port": 1}]}})
    )
    (tmp_path / "dir.yaml").mkdir()
    (tmp_path / "dir.yaml" / "deep.yaml").write_text(service("deep", "127.96.0.50"))
    snapshot, problems = read_once(asyncio.run, tmp_path)
    assert (ips_of(snapshot), problems) == (["127.96.0.1", "127.96.0.2", "127.96.0.99"], ())


def test_a_file_beside_others_and_twice_the_same(tmp_path):
    (tmp_path / "a.yaml").write_text(service())
    (tmp_path / "b.yaml").write_text(service("other", "127.96.0.2"))
    snapshot, problems = read_once(asyncio.run, tmp_path / "a.yaml", tmp_path / "." / "a.yaml")
    assert (ips_of(snapshot), problems) == (["127.96.0.1"], ())


def test_one_object_in_two_files_names_both(tmp_path):
    (tmp_path / "b.yaml").write_text(service(ip="127.96.0.2"))
    (tmp_path / "a.yaml").write_text(service())
    snapshot, (problem,) = read_once(asyncio.run, tmp_path)
    assert ips_of(snapshot) == ["127.96.0.1"]
    assert problem.startswith(f"{tmp_path}/b.yaml: Service default/web: found in {tmp_path}/a.yaml as well")


def test_paths_that_are_missing_at_the_start_are_all_told(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ConfigError) as caught:
        read_once(asyncio.run, tmp_path, tmp_path / "none", tmp_path / "fifo")
    first, second = caught.value.problems
    assert first.startswith(f"--manifests={tmp_path}/none: No such file")
    assert second.startswith(f"--manifests={tmp_path}/fifo:")


def test_files_that_cannot_be_read_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(manifests, "MAX_SIZE", 1 << 20)
    (tmp_path / "good.yaml").write_text(service())
    (tmp_path / "large.yaml").write_text("#" * (1 << 20) + "#")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    (tmp_path / "nowhere.yaml").symlink_to("none")
    (tmp_path / "broken.yaml").write_text("a: [1, 2\nb: 3\n")
    (tmp_path / "broken.json").write_text('{"a": \n')
    (tmp_path / "deep.yaml").write_text("[" * 100_000)
    os.mkfifo(tmp_path / "fifo.yaml")
    snapshot, problems = read_once(asyncio.run, tmp_path)
    assert ips_of(snapshot) == ["127.96.0.1"]
    told = {problem.removeprefix(f"{tmp_path}/").partition(":")[0]: problem for problem in problems}
    assert sorted(told) == ["broken.json", "broken.yaml", "deep.yaml", "fifo.yaml", "large.yaml", "loop.yaml"]
    assert "line 2, column" in told["broken.yaml"]
    assert "more than 1 MiB" in told["large.yaml"]
    assert "regular file" in told["fifo.yaml"]


def test_changes_are_served_soon(run, tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(service())

    @scenario(run, tmp_path)
    async def _(watched):
        times = []
        for number in range(2, 7):
            file.write_text(service(ip=f"127.96.0.{number}"))
            times.append(await watched.until_ips(f"127.96.0.{number}"))
        assert min(times) < 0.2
        (tmp_path / "b.yaml").write_text(service("other", "127.96.1.1"))
        await watched.until_ips("127.96.0.6", "127.96.1.1")
        file.unlink()
        await watched.until_ips("127.96.1.1")


def test_nothing_is_read_or_published_while_nothing_changes(run, tmp_path):
    (tmp_path / "a.yaml").write_text(service())

    @scenario(run, tmp_path)
    async def _(watched):
        await asyncio.sleep(0.3)
        (tmp_path / "notes.txt").write_text("not a manifest")
        (tmp_path / "a.yaml").write_text("# the same with a comment\n" + service())
        await asyncio.sleep(0.3)
        assert len(watched.published) == 1


def test_a_file_saved_by_renaming(run, tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(service())

    @scenario(run, file)
    async def _(watched):
        for number in range(2, 5):
            (tmp_path / ".a.yaml.new").write_text(service(ip=f"127.96.0.{number}"))
            (tmp_path / ".a.yaml.new").rename(file)
            await watched.until_ips(f"127.96.0.{number}")


def test_a_half_written_file_keeps_what_it_held(run, tmp_path, caplog):
    file = tmp_path / "a.yaml"
    file.write_text(service() + "---\n" + service("other", "127.96.0.2"))

    @scenario(run, tmp_path)
    async def _(watched):
        file.write_text(service(ip="127.96.0.3") + "---\nspec: [")
        await watched.until_problem("a.yaml: line")
        assert ips_of(watched.published[-1]) == ["127.96.0.1", "127.96.0.2"]
        file.write_text(service(ip="127.96.0.3"))
        await watched.until_ips("127.96.0.3")
        assert watched.source.problems == ()


def test_a_refused_object_keeps_its_former_version(run, tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(service() + "---\n" + service("other", "127.96.0.2"))

    @scenario(run, tmp_path)
    async def _(watched):
        file.write_text(service(ip="127.0.0.x") + "---\n" + service("other", "127.96.0.9"))
        await watched.until_ips("127.96.0.1", "127.96.0.9")
        name = ServicePortName("default", "web")
        assert watched.published[-1].services[name] is watched.published[0].services[name]


@pytest.mark.parametrize("path", [".", "a.yaml"])
def test_a_config_map_that_is_swapped(run, tmp_path, path):
    """As the kubelet does it: the files are links through `..data`, which is renamed over."""

    def version(number):
        data = tmp_path / f"..v{number}"
        data.mkdir()
        (data / "a.yaml").write_text(service(ip=f"127.96.0.{number}"))
        (tmp_path / "..data_tmp").symlink_to(data.name)
        (tmp_path / "..data_tmp").rename(tmp_path / "..data")

    version(1)
    (tmp_path / "a.yaml").symlink_to("..data/a.yaml")

    @scenario(run, tmp_path / path)
    async def _(watched):
        for number in range(2, 6):
            version(number)
            shutil.rmtree(tmp_path / f"..v{number - 1}")
            await watched.until_ips(f"127.96.0.{number}")


def test_the_target_of_a_link_is_watched(run, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "manifests").mkdir()
    target = tmp_path / "elsewhere" / "target"
    target.write_text(service())
    (tmp_path / "manifests" / "a.yaml").symlink_to(target)

    @scenario(run, tmp_path / "manifests")
    async def _(watched):
        target.write_text(service(ip="127.96.0.2"))
        await watched.until_ips("127.96.0.2")


def test_a_directory_that_goes_and_returns(run, tmp_path):
    directory = tmp_path / "x" / "manifests"
    directory.mkdir(parents=True)
    (directory / "a.yaml").write_text(service())

    @scenario(run, directory)
    async def _(watched):
        for number in range(2, 5):
            shutil.rmtree(directory.parent)
            await watched.until_problem("No such file or directory; what was read from it is served")
            assert len(ips_of(watched.published[-1])) == 1
            directory.mkdir(parents=True)
            (directory / "a.yaml").write_text(service(ip=f"127.96.0.{number}"))
            await watched.until_ips(f"127.96.0.{number}")
            (directory / "a.yaml").write_text(service(ip=f"127.96.1.{number}"))
            await watched.until_ips(f"127.96.1.{number}")


def test_a_reload_reads_and_publishes_anew(run, tmp_path):
    (tmp_path / "a.yaml").write_text(service())

    @scenario(run, tmp_path)
    async def _(watched):
        watched.source.reload()
        await watched.until(lambda _: len(watched.published) == 2)
        assert watched.published[0] == watched.published[1]


def test_each_problem_is_logged_once(run, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    file = tmp_path / "a.yaml"
    file.write_text(service().replace("port: 80", "port: 0"))

    @scenario(run, tmp_path)
    async def _(watched):
        for _ in range(2):
            watched.source.reload()
            await watched.until(lambda _: len(watched.published) > 1)
        (tmp_path / "b.yaml").write_text(service("other"))
        await watched.until_ips("127.96.0.1")

    (record,) = caplog.records
    assert "spec.ports[0].port: found 0" in record.getMessage()


def test_a_directory_that_cannot_be_watched_is_looked_at_again(run, tmp_path, monkeypatch, caplog):
    """inotify has a limit of watches for each user; reaching it must not end the serving."""

    def refuse(directories):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifests, "Changes", refuse)
    (tmp_path / "a.yaml").write_text(service())

    @scenario(run, tmp_path)
    async def _(watched):
        (tmp_path / "a.yaml").write_text(service(ip="127.96.0.2"))
        await watched.until_ips("127.96.0.2")

    assert "cannot watch the manifests" in caplog.text


@pytest.fixture
def read(monkeypatch):
    """The names of the files that were read."""
    names = []
    original = manifests._slurp

    def spy(file, *rest):
        names.append(os.path.basename(file))
        return original(file, *rest)

    monkeypatch.setattr(manifests, "_slurp", spy)
    return names


def test_a_change_of_one_file_opens_no_other(run, tmp_path, read):
    for number in range(50):
        (tmp_path / f"s{number}.yaml").write_text(service(f"s{number}", f"127.96.0.{number + 1}"))
    all_of_them = {f"127.96.0.{number + 1}" for number in range(50)}

    @scenario(run, tmp_path)
    async def _(watched):
        assert len(read) == 50
        read.clear()
        (tmp_path / "s7.yaml").write_text(service("s7", "127.96.1.7"))
        await watched.until_ips(*(all_of_them - {"127.96.0.8"}), "127.96.1.7")
        (tmp_path / ".s8.new").write_text(service("s8", "127.96.1.8"))
        (tmp_path / ".s8.new").rename(tmp_path / "s8.yaml")
        await watched.until_ips(*(all_of_them - {"127.96.0.8", "127.96.0.9"}), "127.96.1.7", "127.96.1.8")
        (tmp_path / "s7.yaml").unlink()
        await watched.until_ips(*(all_of_them - {"127.96.0.8", "127.96.0.9"}), "127.96.1.8")
        assert set(read) == {"s7.yaml", "s8.yaml"}


def test_a_file_is_not_read_before_it_is_whole(run, tmp_path, read):
    (tmp_path / "a.yaml").write_text(service())

    @scenario(run, tmp_path)
    async def _(watched):
        read.clear()
        with (tmp_path / "a.yaml").open("w") as opened:
            opened.write(service()[:20])
            opened.flush()
            await asyncio.sleep(0.1)
            assert read == []
            opened.write(service(ip="127.96.0.2")[20:])
        await watched.until_ips("127.96.0.2")
        assert watched.source.problems == ()


def test_a_file_that_is_named_and_goes_away_is_served_until_it_is_back(run, tmp_path):
    file = tmp_path / "web.yaml"
    file.write_text(service("web", "10.96.0.1"))

    @scenario(run, file)
    async def _(watched):
        published = len(watched.published)
        file.unlink()
        await watched.until_problem("what was read from it is served until it is back")
        assert len(watched.published) == published
        file.write_text(service("web", "10.96.0.2"))
        await watched.until_ips("10.96.0.2")
