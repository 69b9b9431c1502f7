"""Isolation from the sandbox servers of other tests."""

from collections.abc import Iterator

import pytest

from sdzero.graders.sandbox.client import JOB_VARIABLES


@pytest.fixture(autouse=True, scope="module")
def no_job() -> Iterator[None]:
    """Unset the variables that Lightning leaves set after a distributed fit: processes of a job share one server."""
    with pytest.MonkeyPatch.context() as patch:
        for name in JOB_VARIABLES:
            patch.delenv(name, raising=False)
        yield
