"""One S3 server process for all tests of this room, with a bucket of its own for each test."""

from collections.abc import Iterator

import pytest

from nltrain.local.embedded_s3 import EmbeddedS3


@pytest.fixture(scope="session")
def s3() -> Iterator[EmbeddedS3]:
    with EmbeddedS3() as server:
        yield server


@pytest.fixture
def bucket(s3: EmbeddedS3, request: pytest.FixtureRequest) -> Iterator[str]:
    """URL of an empty bucket; the environment points at the server."""
    name = f"test-{abs(hash(request.node.nodeid)) % 10**12}"
    with s3.in_environment():
        s3.create_bucket(name)
        yield f"s3://{name}"
