"""What can be set, and how it is read: flags into one validated `Config`, all errors at once.

`table` declares every flag once, with the field of `Config` it sets; `reading` makes a Config of a command line, which
`commandline` takes apart. A `Flag` has a kind of value (`kinds`), written as Go programs write it (`values`).
"""

from userspace_proxy.config.flag import Flag
from userspace_proxy.config.reading import Show, parse
from userspace_proxy.config.table import (
    HELP,
    VERSION,
    CaptureWay,
    Config,
    ContentType,
    LoggingFormat,
    settings,
)
from userspace_proxy.config.values import Address, PortRange

__all__ = [
    "HELP",
    "VERSION",
    "Address",
    "CaptureWay",
    "Config",
    "ContentType",
    "Flag",
    "LoggingFormat",
    "PortRange",
    "Show",
    "parse",
    "settings",
]
