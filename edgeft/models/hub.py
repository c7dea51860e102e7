"""Can the hub be asked? Found out at once and without a word: its own client tries six times and reports each."""

from __future__ import annotations

import contextlib
import logging
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import TypeVar
from urllib.parse import urlsplit

SECONDS = 5.0  # to take a connection in
REMEMBERED_SECONDS = 60.0  # a stage asks for the same model several times
_looked: dict[str, tuple[float, bool]] = {}  # by endpoint: when, and whether it was reachable

Result = TypeVar("Result")


def ask(call: Callable[..., Result], *arguments: object, **options: object) -> Result:
    """What a function of huggingface_hub gives, from the hub, or from the cache alone where that cannot be reached."""
    if not reachable():
        options["local_files_only"] = True
    with _silent():
        return call(*arguments, **options)


def reachable() -> bool:
    """Whether the hub takes a connection. What lies behind a proxy only the proxy knows."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    place = urlsplit(constants.ENDPOINT)
    if urllib.request.getproxies().get(place.scheme) and not urllib.request.proxy_bypass(place.hostname or ""):
        return True
    when, found = _looked.get(constants.ENDPOINT, (float("-inf"), False))
    if time.monotonic() - when > REMEMBERED_SECONDS:
        found = _connects(place.hostname or "", place.port or (80 if place.scheme == "http" else 443))
        _looked[constants.ENDPOINT] = time.monotonic(), found
    return found


def _connects(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=SECONDS).close()
    except OSError:  # no such name, no route, refused, too slow
        return False
    return True


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without what huggingface_hub logs: a problem ends as an error, which says it once."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
