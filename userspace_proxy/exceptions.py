"""What can go wrong, as one tree.

    UserspaceProxyError
    ├── ConfigError            flags that cannot be used; carries every problem found
    ├── ObjectError            one Service, EndpointSlice or Endpoints object that is refused
    ├── CredentialsError       who we are to an API server cannot be told now; tried again
    ├── APIError               an API server that refuses a request, or that cannot be reached
    ├── HeaderError            a connection that does not start with the header it should
    ├── PortError              a port that cannot be had (in use, claimed by another, range exhausted)
    ├── NoEndpoints            nowhere to send a client to; ends that connection only
    ├── ProtocolUnavailable    a protocol this host or this version does not serve
    └── CaptureError           the kernel could not be made to hand us traffic
        └── CaptureUnavailable this way of capturing does not work on this host at all

Messages say what was found, what is allowed, and what to do; whoever catches one logs it as it is.
"""

from __future__ import annotations

from collections.abc import Sequence


class UserspaceProxyError(Exception):
    """Base of everything raised on purpose."""


class ConfigError(UserspaceProxyError):
    """Flags that cannot be used. `problems` has one line for each, all of them; `notices`, what else is to be known."""

    def __init__(self, problems: Sequence[str], notices: Sequence[str] = ()) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)
        self.notices = tuple(notices)


class ObjectError(UserspaceProxyError):
    """One object that is refused.

    `where` is a file (with the document's number where it has several) or a URL; `what` names the
    object; `problems` has one `field: found, allowed` line for each.
    """

    def __init__(self, where: str, what: str, problems: Sequence[str]) -> None:
        super().__init__(f"{where}: {what}: " + "; ".join(problems))
        self.where = where
        self.what = what
        self.problems = tuple(problems)


class CredentialsError(UserspaceProxyError):
    """Who we are to the API server, or the way to it, cannot be told from what is there now."""


class APIError(UserspaceProxyError):
    """An API server that refuses, or (`status` 0) that there is no way to, or that breaks off.

    `retry_after` is the time in seconds that it asks us to wait, 0 where it does not.
    """

    def __init__(self, message: str, *, status: int = 0, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


class HeaderError(UserspaceProxyError):
    """The start of a connection that is no header of the PROXY protocol."""


class PortError(UserspaceProxyError):
    """A port that cannot be had. That of a service port is tried again at the next sync."""


class NoEndpoints(UserspaceProxyError):
    """A service port has no usable endpoint; the client is refused."""


class ProtocolUnavailable(UserspaceProxyError):
    """A protocol that this host or this version does not serve."""


class CaptureError(UserspaceProxyError):
    """The kernel refused rules, routes or a conntrack request."""


class CaptureUnavailable(CaptureError):
    """This way of capturing does not work on this host: missing tables, or no permission."""
