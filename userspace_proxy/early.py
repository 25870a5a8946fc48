"""What is done before anything else, the imports included, which take some tenths of a second."""

import os
import signal


def answer_signals() -> None:
    """While nothing has been started, SIGTERM and SIGINT are an end in order, and SIGHUP finds all to be read anyway.

    A function that does nothing, for SIGHUP, and not SIG_IGN, which programs that we start would inherit.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(0))
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # else nohup ignores it, also for what we start
        signal.signal(signal.SIGHUP, lambda *_: None)
