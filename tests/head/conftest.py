"""One head for all tests of what its users do from outside: submit jobs, deploy, let it add nodes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.head import Head, ray_head


@pytest.fixture(scope="package")
def head() -> Iterator[Head]:
    """A cluster of its own, beside that of the session."""
    with ray_head() as head:
        yield head
