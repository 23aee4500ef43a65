"""Signals that end a run: after the first the step is finished and saved, the second stops at once."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from fastpref.method.errors import StopSignal

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stop:
    """The signals that a run has received."""

    def __init__(self) -> None:
        self.number: int | None = None
        """Number of the first, or None."""
        self.at_once = False
        """Whether there was a second."""

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Note the first signal; raise at the second."""
        name = signal.Signals(number).name
        if self.number is not None:
            self.at_once = True
            raise error(number, f"{name}: stopped at once. The same call goes on from the last checkpoint.")
        self.number = number
        # Not print: a signal may come while the same stream is being written to.
        os.write(2, f"{name}: the step is finished and saved first. Send it again to stop at once.\n".encode())


def error(number: int, message: str) -> BaseException:
    """The exception that ends a run after a signal: `KeyboardInterrupt` for INT, else `StopSignal`."""
    if number == signal.SIGINT:
        return KeyboardInterrupt(message)
    return StopSignal(number, message)


@contextmanager
def stopping() -> Iterator[Stop]:
    """Receive INT, TERM and HUP while the block runs; what handled them before does so again afterwards.

    Outside the main thread, which alone may handle signals, nothing is changed; nor is a signal that is ignored, as HUP
    is under nohup.
    """
    stop = Stop()
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in SIGNALS}
    # None stands for a handler that Python did not set, and could not set again.
    ours = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]
    try:
        for number in ours:
            signal.signal(number, stop.handle)
        yield stop
    finally:
        for number in ours:
            signal.signal(number, before[number])
