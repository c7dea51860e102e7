"""How is a run asked to stop, so that it ends between two steps?"""

from __future__ import annotations

import signal
import threading
from types import FrameType


class Stop:
    """Turns the first Ctrl-C or SIGTERM into a request to stop after this step; a second one stops at once.

    Signals are the main thread's alone: training in another one leaves them as they are.
    """

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Stop:
        numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        self.old = {number: signal.signal(number, self._ask) for number in numbers}
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_: object) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)
