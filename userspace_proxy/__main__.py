"""`python -m userspace_proxy` is the command `userspace-proxy`."""

import sys

from userspace_proxy.cli import main

sys.exit(main())
