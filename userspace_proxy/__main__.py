"""The command `userspace-proxy`, and `python -m userspace_proxy`.

Here is only what must be done before the imports, which take some tenths of a second: a SIGTERM or SIGINT until then
finds nothing to put in order and ends us at once, as if all had been. Everything else is `cli`'s.
"""

import os
import signal
import sys


def main() -> int:
    end_at_once_on_signals()
    from userspace_proxy import cli

    return cli.main(sys.argv[1:])


def end_at_once_on_signals() -> None:
    """While nothing has been started that would have to be ended in order."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(0))


if __name__ == "__main__":
    sys.exit(main())
