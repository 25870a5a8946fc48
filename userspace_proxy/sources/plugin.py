"""Exec plugins: commands that a kubeconfig names, and that print credentials.

One that hangs is killed with all that it has started (a process group of its own), when its time is over as well as
when nobody waits for it any more. It is asked once for each set of credentials, and again when those are refused:
`sources.credentials` and `sources.connection` see to that.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Mapping
from contextlib import suppress

import msgspec

from userspace_proxy.exceptions import CredentialsError
from userspace_proxy.sources.kubeconfig import Plugin

TIMEOUT = 60.0
"""Seconds; plugins ask servers of their own."""
REAPED_WITHIN = 1.0
"""Seconds; what is killed is gone at once, unless the kernel holds it."""
SHOWN = 500
"""Characters of what a plugin complains of."""

_Text = str | None


class Status(msgspec.Struct, rename="camel"):
    token: _Text = None
    client_certificate_data: _Text = None
    """PEM as it is, and so is the key."""
    client_key_data: _Text = None


class _Credential(msgspec.Struct, rename="camel"):
    api_version: str
    kind: str
    status: Status


async def ask(plugin: Plugin, command: str, *, timeout: float = TIMEOUT) -> Status:
    """Run `command` as the plugin says. Raises CredentialsError, which tells the plugin's name and complaints."""
    name = f"the exec plugin {plugin.command}"
    about = {"apiVersion": plugin.api_version, "kind": "ExecCredential", "spec": {"interactive": False}}
    environment = {variable.name: variable.value for variable in plugin.env or ()}
    environment = {**os.environ, **environment, "KUBERNETES_EXEC_INFO": json.dumps(about)}
    try:
        async with asyncio.timeout(timeout):
            status, output, complaints = await _run([command, *(plugin.args or ())], environment)
    except TimeoutError:
        raise CredentialsError(f"{name} took longer than {timeout:g} s, and was killed") from None
    except (OSError, ValueError) as error:  # a NUL in an argument is a ValueError
        raise CredentialsError(f"{name} cannot be run: {error}") from None
    if status != 0:
        said = complaints.decode(errors="replace").strip()[-SHOWN:]
        raise CredentialsError(f"{name} ended with status {status}{said and f': {said}'}")
    return _read(name, plugin, output)


async def _run(command: list[str], environment: Mapping[str, str]) -> tuple[int | None, bytes, bytes]:
    # Its start is seen through in any case: who gave it up would know of no process to kill.
    starting = asyncio.ensure_future(  # noqa: TID251 - awaited below, come what may
        asyncio.create_subprocess_exec(
            *command, env=environment, stdin=DEVNULL, stdout=PIPE, stderr=PIPE, start_new_session=True
        )
    )
    try:
        process = await asyncio.shield(starting)
    except asyncio.CancelledError:
        with suppress(OSError, ValueError):  # it did not start
            await _kill(await starting)
        raise
    try:
        output, complaints = await process.communicate()
    except BaseException:
        await _kill(process)
        raise
    return process.returncode, output, complaints


async def _kill(process: Process) -> None:
    """Its children, too, even if it has ended itself and they are what keeps its output open."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(TimeoutError):
        async with asyncio.timeout(REAPED_WITHIN):
            await process.wait()


def _read(name: str, plugin: Plugin, output: bytes) -> Status:
    try:
        credential = msgspec.json.decode(output, type=_Credential)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CredentialsError(f"{name}: found {error} in its output; allowed: an ExecCredential in JSON") from None
    if (credential.kind, credential.api_version) != ("ExecCredential", plugin.api_version):
        found = f"{credential.kind} of {credential.api_version}"
        raise CredentialsError(f"{name}: found {found}; allowed: ExecCredential of {plugin.api_version}")
    status = credential.status
    if bool(status.client_certificate_data) != bool(status.client_key_data):
        raise CredentialsError(f"{name}: found one of clientCertificateData and clientKeyData; allowed: both or none")
    if not status.token and not status.client_certificate_data:
        raise CredentialsError(f"{name}: found neither token nor clientCertificateData; allowed: one of them, or both")
    return status
