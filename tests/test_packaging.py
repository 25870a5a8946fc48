"""The two commands of a stranger: what make would do, in which order, and when it has nothing to do."""

from __future__ import annotations

import fnmatch
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

from userspace_proxy.config import Config

TOP = pathlib.Path(__file__).parent.parent
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"


def make(*arguments: str) -> list[str]:
    """The commands that make would run."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "-n", "--no-print-directory", "-C", str(TOP), f"PYTHON={sys.executable}", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.splitlines()


def installed(venv: pathlib.Path, *what: str) -> str:
    """A venv in which these have been installed since setup.cfg was last changed."""
    for name in what:
        (venv / f".{name}-{VERSION}").touch()
    return f"VENV={venv}"


def test_a_fresh_clone_is_installed_first(tmp_path):
    lines = make("run", f"VENV={tmp_path}")
    assert any("-m venv --clear" in line for line in lines)
    assert any(line.endswith("--editable '.'") for line in lines)
    assert lines[-1] == f"{tmp_path}/bin/python examples/demo.py "


def test_what_is_installed_is_not_installed_again(tmp_path):
    assert make("run", "ARGS=-v4", installed(tmp_path, "run")) == [
        ".ci/packages run",
        f"{tmp_path}/bin/python examples/demo.py -v4",
    ]


def test_another_python_gets_a_venv_of_its_own(tmp_path):
    venv = installed(tmp_path, "run")
    (tmp_path / f".run-{VERSION}").rename(tmp_path / ".run-3.0")
    assert any("-m venv --clear" in line for line in make("run", venv))


def test_changed_dependencies_are_installed(tmp_path):
    venv = installed(tmp_path, "run")
    os.utime(tmp_path / f".run-{VERSION}", (1, 1))
    assert any("pip install" in line for line in make("run", venv))


def test_all_checks_come_before_the_tests(tmp_path):
    lines = make("test", installed(tmp_path, "test"))
    assert [line.removeprefix(f"{tmp_path}/bin/").strip() for line in lines] == [
        "ruff check .",
        "ruff format --check .",
        "mypy",
        "lint-imports",
        ".ci/packages test",
        "coverage erase",
        "coverage run -m pytest",
        "coverage combine --quiet",
        "coverage report",
    ]


def test_ci_runs_the_tests_from_anywhere_and_asks_nothing(tmp_path):
    (tmp_path / "make").write_text('#!/bin/sh\npwd; echo "$@"; read -r line || echo no input\n')
    (tmp_path / "make").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        [TOP / ".ci" / "run"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines() == [str(TOP), "--no-print-directory test", "no input"]


def packages(tmp_path: pathlib.Path, *arguments: str, has: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Ask for packages as nobody, on a host that has these programs and no others."""
    for name in (*has, "bash", "sh"):
        (tmp_path / name).symlink_to(shutil.which("sh") or "")
    (tmp_path / "id").write_text("#!/bin/sh\necho 1000\n")
    (tmp_path / "id").chmod(0o755)
    script = (TOP / ".ci" / "packages").read_text().replace("PATH=$PATH:/usr/sbin:/sbin", "")
    command = [shutil.which("bash") or "bash", "-c", script, "packages", *arguments]
    return subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False, timeout=60)


def test_without_root_exactly_what_is_missing_is_named(tmp_path):
    done = packages(tmp_path, "run", has=("curl", "modprobe"))
    assert done.returncode == 0
    assert done.stderr.splitlines() == [
        "Debian packages missing to run: iptables",
        "  not installed now, which takes root and apt; as root: apt-get install iptables",
    ]


def test_nothing_is_said_when_nothing_is_missing(tmp_path):
    done = packages(tmp_path, "run", has=("curl", "modprobe", "iptables-legacy"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_without_a_compiler_nothing_goes_on(tmp_path):
    done = packages(tmp_path, "build", sys.executable)
    assert done.returncode == 1
    assert "missing to build: " in done.stderr
    assert "gcc" in done.stderr


def test_an_unknown_set_of_packages(tmp_path):
    done = packages(tmp_path, "everything")
    assert done.returncode == 2
    assert "no such set: everything" in done.stderr


@pytest.mark.parametrize("source", ["setup.cfg", "pyproject.toml", "README.md", "LICENSE", "userspace_proxy"])
def test_the_image_is_built_from_what_docker_is_shown(source):
    lines = (TOP / ".dockerignore").read_text().split()
    assert any(fnmatch.fnmatch(source, line[1:]) for line in lines if line.startswith("!"))
    copied = [line for line in (TOP / "Dockerfile").read_text().splitlines() if line.startswith("COPY ")]
    assert any(source in line.split() for line in copied)


def dockerfile() -> str:
    """Each instruction in one line."""
    return re.sub(r"\\\n", "", (TOP / "Dockerfile").read_text())


def test_the_image_is_built_by_the_steps_of_the_dockerfile(tmp_path):
    """Without an engine: copy what is copied, build the wheel, install it, start its entry point."""
    source, wheels, target = tmp_path / "src", tmp_path / "wheels", tmp_path / "target"
    source.mkdir()
    for line in re.findall(r"^COPY (.*)$", dockerfile(), re.MULTILINE):
        *files, place = line.split()
        for file in files:
            if (TOP / file).is_dir():
                shutil.copytree(TOP / file, source / place, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(TOP / file, source / place)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    [build] = re.findall(r"^RUN pip (wheel .*)$", dockerfile(), re.MULTILINE)
    # What it depends on is what the tests run with.
    wheel_command = [*pip, *build.replace("/wheels", str(wheels)).split(), "--no-deps", "--quiet"]
    subprocess.run(wheel_command, cwd=source, check=True, timeout=110)
    [wheel] = wheels.iterdir()
    modules = {str(path.relative_to(TOP)) for path in (TOP / "userspace_proxy").rglob("*.py")}
    assert modules <= set(zipfile.ZipFile(wheel).namelist())
    subprocess.run([*pip, "install", "--no-deps", "--quiet", "--target", target, wheel], check=True, timeout=60)
    [entry] = re.findall(r'^ENTRYPOINT \["(.*)"\]$', dockerfile(), re.MULTILINE)
    environment = os.environ | {"PYTHONPATH": str(target)}
    shown = subprocess.run(
        [target / "bin" / entry, "--version"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        check=True,
        timeout=60,
    )
    assert shown.stdout.startswith(b"userspace-proxy ")


def test_the_health_check_of_the_image_asks_for_a_page_that_there_is():
    [check] = re.findall(r'^HEALTHCHECK .*CMD \["python", "-c", "(.*)"\]$', dockerfile(), re.MULTILINE)
    compile(check, "HEALTHCHECK", "exec")
    assert f":{Config().healthz_bind_address[1]}/livez" in check
