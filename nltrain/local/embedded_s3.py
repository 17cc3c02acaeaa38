"""A real S3 server of our own for `make demo`, tests and benchmarks: moto's, in its own process, with its own folder.

`EmbeddedS3()` starts it on a free loopback port; `stop()` (or leaving the with block) ends exactly that process and
removes its folder. The server also ends by itself when its parent dies, so nothing is left behind. Limits: objects
live as long as the server; no authentication is checked.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import Self

from nltrain.errors import UserError
from nltrain.local.environment import added_to_environment
from nltrain.store import S3Store

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 5.0
LOOPBACK = ("127.0.0.1", "localhost")


class EmbeddedS3Error(UserError):
    """The embedded server did not start."""


class EmbeddedS3:
    """A running S3 server: `endpoint_url`, `pid`, `environment()`."""

    def __init__(self, bucket: str | None = None):
        """Starts the server and makes `bucket` when one is named."""
        self.folder = tempfile.mkdtemp(prefix="nltrain-s3-")
        # A configuration of its own, without the user's profiles, endpoints and credentials.
        self._config_file = os.path.join(self.folder, "aws-config")
        with open(self._config_file, "w", encoding="utf-8") as file:
            file.write("[default]\nregion = us-east-1\n")
        # moto writes objects to TMPDIR and does not warn when it is full: give it a folder that we remove.
        environment = os.environ | self._account() | {"TMPDIR": self.folder, "PYTHONUTF8": "1"}
        command = [sys.executable, "-m", "nltrain.local.embedded_s3"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True, start_new_session=True
        )
        self.pid = self._process.pid
        self.endpoint_url = f"http://127.0.0.1:{self._read_port()}"
        if bucket is not None:
            try:
                self.create_bucket(bucket)
            except BaseException:
                self.stop()
                raise

    def create_bucket(self, bucket: str) -> None:
        """Makes an empty bucket."""
        with self.in_environment():
            S3Store(f"s3://{bucket}", attempts=3, timeout_s=START_TIMEOUT_S, backoff_s=0.1).create_bucket()

    def environment(self) -> dict[str, str]:
        """The variables that send S3 clients to this server under any environment; for child processes."""
        return self._account() | {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            # It takes precedence over AWS_ENDPOINT_URL; where it is empty, Arrow uses AWS itself.
            "AWS_ENDPOINT_URL_S3": self.endpoint_url,
            "NO_PROXY": _with_loopback("NO_PROXY"),
            "no_proxy": _with_loopback("no_proxy"),
        }

    def _account(self) -> dict[str, str]:
        """A value for each AWS variable that a user may have set to something unusable here, or to an account."""
        return {
            "AWS_ACCESS_KEY_ID": "embedded",
            "AWS_SECRET_ACCESS_KEY": "embedded",
            "AWS_SESSION_TOKEN": "",
            "AWS_SECURITY_TOKEN": "",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_PROFILE": "default",
            "AWS_DEFAULT_PROFILE": "default",
            "AWS_CONFIG_FILE": self._config_file,
            "AWS_SHARED_CREDENTIALS_FILE": self._config_file,
            "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "false",
            "AWS_USE_FIPS_ENDPOINT": "false",
            "AWS_USE_DUALSTACK_ENDPOINT": "false",
        }

    @contextlib.contextmanager
    def in_environment(self) -> Iterator[Self]:
        """os.environ points here inside the with block, and is as before after it."""
        with added_to_environment(self.environment()):
            del os.environ["AWS_ENDPOINT_URL_S3"]  # so that a test can replace AWS_ENDPOINT_URL alone
            yield self

    def stop(self) -> None:
        """Ends the server process and removes its folder; harmless when done twice."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def _read_port(self) -> int:
        assert self._process.stdout is not None
        watchdog = threading.Timer(START_TIMEOUT_S, self._process.kill)
        watchdog.start()
        try:
            line = self._process.stdout.readline()
        finally:
            watchdog.cancel()
        if not line.strip().isdigit():
            self.stop()
            raise EmbeddedS3Error(
                f"the embedded S3 server said {line.strip()!r} instead of its port: install moto[server,s3] "
                "(pip install -e '.[dev]') and see its message above"
            )
        return int(line)


def _with_loopback(variable: str) -> str:
    """The user's hosts that need no proxy, and this machine."""
    named = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    hosts = [host.strip() for host in (os.environ.get(variable) or named).split(",") if host.strip()]
    if "*" in hosts:
        return "*"
    return ",".join([*hosts, *(host for host in LOOPBACK if host not in hosts)])


def serve() -> None:
    """The server process: prints its port, serves until its standard input closes (the parent stopped or died)."""
    import logging

    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    class KeepAliveHandler(MotoRequestHandler):
        # HTTP/1.0 would make each request open a connection of its own.
        protocol_version = "HTTP/1.1"

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    application = DomainDispatcherApplication(create_backend_app)
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=KeepAliveHandler)
    print(server.server_port, flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()
    shutil.rmtree(os.environ["TMPDIR"], ignore_errors=True)
    os._exit(0)


if __name__ == "__main__":
    serve()
