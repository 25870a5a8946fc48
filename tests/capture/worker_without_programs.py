"""A worker on a machine that has no iptables-legacy-save and -restore: python-iptables has to do it all."""

import os

from userspace_proxy.capture import worker, xtables

if __name__ == "__main__":
    os.environ["PATH"] = "/nonexistent"
    xtables._PROGRAM_PATH = "/nonexistent"
    worker.main()
