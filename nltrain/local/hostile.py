"""An environment whose variables all lead away from this machine's own servers, for tests and rehearsals.

A program that follows one of them reaches the Trap, a server that records each request.
"""

import http.server
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# The beginning of a command that then runs as a uid without an entry in /etc/passwd; files stay this user's own.
STRANGER = ("unshare", "--user", "--map-user=54321", "--map-group=54321")


class Trap:
    """A web server that stands for the user's proxy and the user's S3; `requests` is what reached it."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        trap = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def handle_one_request(self) -> None:
                trap.requests.append(self.rfile.readline().decode(errors="replace").strip())
                self.wfile.write(b"HTTP/1.1 418 trapped\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                self.close_connection = True

            def log_message(self, *_: Any) -> None: ...

        # Another address of this machine than the one that local servers have: nothing local is meant for it.
        self._server = http.server.ThreadingHTTPServer(("127.0.0.2", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.2:{self._server.server_port}"

    def close(self) -> None:
        """End the server."""
        self._server.shutdown()
        self._server.server_close()


def hostile_environment(trap: str, home: Path) -> dict[str, str]:
    """Everything of this process's environment but what sends a run elsewhere; `home` holds files that do so too."""
    (home / ".aws").mkdir(parents=True, exist_ok=True)
    (home / ".aws" / "config").write_text(
        f"[default]\nregion = mars-1\nendpoint_url = {trap}\n[profile work]\nendpoint_url = {trap}\n"
    )
    (home / ".netrc").write_text("default login somebody password secret\n")
    (home / ".netrc").chmod(0o600)
    names = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
    kept = {name: value for name, value in os.environ.items() if name.lower() != "no_proxy"}
    return kept | dict.fromkeys(names, trap) | {
        "AWS_PROFILE": "nobody",
        "AWS_DEFAULT_PROFILE": "nobody",
        "AWS_ENDPOINT_URL": trap,
        "AWS_ENDPOINT_URL_S3": trap,
        "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true",
        "AWS_ACCESS_KEY_ID": "users-own",
        "AWS_SECRET_ACCESS_KEY": "users-own",
        "AWS_SESSION_TOKEN": "users-own",
        "AWS_USE_FIPS_ENDPOINT": "true",
        "AWS_REGION": "mars-1",
        "AWS_CONFIG_FILE": str(home / ".aws" / "config"),
        "RAY_ADDRESS": "http://127.0.0.2:9",
        "RAY_API_SERVER_ADDRESS": "http://127.0.0.2:9",
        "RAY_JOB_HEADERS": "no json",
        "RAY_AUTH_TOKEN_PATH": str(home / "missing"),
        "RAY_TMPDIR": str(home / "missing"),
        "WANDB_API_KEY": "0" * 40,
        "WANDB_BASE_URL": trap,
        "GLOO_SOCKET_IFNAME": "nosuch0",
        "NETRC": str(home / ".netrc"),
        "HOME": str(home),
        "LC_ALL": "C",
        "LANG": "C",
        "PYTHONIOENCODING": "ascii",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
    }  # fmt: skip


@contextmanager
def hostile(home: Path) -> Iterator[tuple[Trap, dict[str, str]]]:
    """(trap, environment); at the end nothing may have reached the trap, nor changed the home folder."""
    trap = Trap()
    try:
        environment = hostile_environment(trap.url, home)
        before = sorted(home.rglob("*"))
        yield trap, environment
        assert not trap.requests, trap.requests
        assert sorted(home.rglob("*")) == before
    finally:
        trap.close()


def can_be_a_stranger() -> bool:
    """Whether this machine has user namespaces, which STRANGER needs."""
    return shutil.which(STRANGER[0]) is not None and not subprocess.run([*STRANGER, "true"]).returncode


def without_home(environment: dict[str, str]) -> dict[str, str]:
    """`environment` of a user who has no home folder and no name."""
    return {name: value for name, value in environment.items() if name not in ("HOME", "USER", "LOGNAME")}


if __name__ == "__main__":
    # A program that uses the embedded S3 as ours do: what it prints is what it read back.
    from nltrain.local.embedded_s3 import EmbeddedS3
    from nltrain.store import open_store
    from nltrain.terminal import print_anything

    print_anything()
    with EmbeddedS3("bucket") as server, server.in_environment():
        open_store("s3://bucket/a").put("key", "ö漢".encode())
        os.environ.update(server.environment())
        print(open_store("s3://bucket/a").get("key").decode(), file=sys.stdout)
