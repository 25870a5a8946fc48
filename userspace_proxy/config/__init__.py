"""What can be set, and how it is read: flags and the config file into one validated `Config`, all errors at once.

`table` has every flag, declared once, with the field of `Config` it sets; `reading` makes a Config of a command line,
which `commandline` takes apart, and of a file, which `document` does. A `Flag` has a kind of value (`kinds`), written
as Go programs write it (`values`). What cannot be set together is in `contradictions`.
"""

from userspace_proxy.config.flag import Flag
from userspace_proxy.config.own import CaptureWay, LoggingFormat
from userspace_proxy.config.reading import Show, parse
from userspace_proxy.config.table import Config, settings
from userspace_proxy.config.values import Address, PortRange

__all__ = [
    "Address",
    "CaptureWay",
    "Config",
    "Flag",
    "LoggingFormat",
    "PortRange",
    "Show",
    "parse",
    "settings",
]
