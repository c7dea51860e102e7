"""The browser that pages are looked at with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from browser import INSTALL, Browser, browser, find_browser


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    path = find_browser()
    if path is None:
        pytest.skip(f"no browser to look at pages with: {INSTALL}")
    with browser(path) as made:
        yield made
