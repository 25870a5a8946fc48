"""Signals before there is anything that they could end in order, and while it is cleaned up."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

SLOW_IMPORTS = """
import importlib.abc, sys, time
class Slow(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "userspace_proxy.cli":
            print("importing", flush=True)
            time.sleep(60)
sys.meta_path.insert(0, Slow())
from userspace_proxy.__main__ import main
sys.exit(main())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_the_imports_is_an_end_in_order(number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_IMPORTS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "importing\n"
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
    assert (process.returncode, errors) == (0, "")


def test_a_hang_up_during_the_imports_ends_nothing() -> None:
    """SIGHUP asks to read anew, and everything is still to be read."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_IMPORTS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
    assert (process.returncode, errors) == (0, "")


SHOW_IGNORED = "import signal; print(signal.getsignal(signal.SIGHUP).name)"
START_ANOTHER = f"""
import subprocess, sys
from userspace_proxy.early import answer_signals
answer_signals()
subprocess.run([sys.executable, "-c", {SHOW_IGNORED!r}], check=True)
"""


@pytest.mark.parametrize(("before", "found"), [((), "SIG_DFL"), (("nohup",), "SIG_IGN")])
def test_programs_that_are_started_have_what_we_were_started_with(before: tuple[str, ...], found: str) -> None:
    command = [*before, sys.executable, "-c", START_ANOTHER]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True, stdin=subprocess.DEVNULL)
    assert done.stdout == f"{found}\n"
