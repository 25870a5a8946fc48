"""The command `userspace-proxy`, and `python -m userspace_proxy`: signals first, then what takes time to import."""

import sys

from userspace_proxy.early import answer_signals


def main() -> int:
    answer_signals()
    from userspace_proxy import cli

    return cli.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
