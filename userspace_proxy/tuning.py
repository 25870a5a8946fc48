"""What is set on this host at the start: room and time-outs of conntrack, and who goes first when memory is short.

Values of the kernel are raised, never lowered, as others may need them. Nothing of this is needed in order to serve, so
what may not be set is told, with what to do about it, and left as it is: in a container /proc/sys is often read-only.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

from userspace_proxy.config import Config

logger = logging.getLogger(__name__)

_NETFILTER = Path("/proc/sys/net/netfilter")
_HASH_SIZE = Path("/sys/module/nf_conntrack/parameters/hashsize")
_OOM_SCORE = Path("/proc/self/oom_score_adj")


def tune_conntrack(config: Config, cpus: int, directory: Path = _NETFILTER, hash_size: Path = _HASH_SIZE) -> None:
    """For a capture that has connections tracked, once it is there."""
    for name, flag, least in _wanted(config, cpus):
        raised = _raise(directory / name, flag, least)
        if raised and name == "nf_conntrack_max":
            # Four connections a bucket, as the kernel has it by itself; it does not follow its own limit.
            _raise(hash_size, flag, least // 4)


def set_oom_score(config: Config, path: Path = _OOM_SCORE) -> None:
    """Processes that are started later get it, too."""
    try:
        path.write_text(str(config.oom_score_adj))
    except OSError as error:
        said = logger.debug if config.oom_score_adj == Config().oom_score_adj else logger.warning
        said("--oom-score-adj=%d: not set, %s: %s", config.oom_score_adj, path, error.strerror)


def _wanted(config: Config, cpus: int) -> Iterator[tuple[str, str, int]]:
    """Names of sysctls, the flags they are for, and the least each should be."""
    if config.conntrack_max_per_core:
        room = max(config.conntrack_min, config.conntrack_max_per_core * cpus)
        yield "nf_conntrack_max", "--conntrack-max-per-core", room
    for state, seconds in (
        ("established", config.conntrack_tcp_timeout_established),
        ("close_wait", config.conntrack_tcp_timeout_close_wait),
    ):
        if seconds >= 1:
            flag = f"--conntrack-tcp-timeout-{state.replace('_', '-')}"
            yield f"nf_conntrack_tcp_timeout_{state}", flag, int(seconds)


def _raise(path: Path, flag: str, least: int) -> bool:
    """Whether it was lower, and is as high as it should be now."""
    found = ""
    try:
        found = path.read_text().strip()
        if int(found) >= least:
            return False
        path.write_text(str(least))
    except OSError as error:
        what = f"{path} is {found}, and cannot be raised" if found else f"{path} cannot be read"
        advice = f"set it to {least} on the host, or {flag}=0 to leave it alone"
        logger.warning("%s: %s: %s; %s", flag, what, error.strerror, advice)
        return False
    logger.info("%s: %s raised from %s to %d", flag, path, found, least)
    return True


def cpus() -> int:
    """How many there are for conntrack, whatever this process may use of them."""
    return os.cpu_count() or 1
