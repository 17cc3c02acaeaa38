"""Turns a cloud's notice that this machine goes into a Ray drain, so that the run saves before it does.

Runs beside `ray start` on a spot machine. Looks every few seconds at the instance metadata service (IMDSv2 of AWS);
when there is a notice, tells Ray how many seconds are left and ends. Standard library and the `ray` command only.

    python watch_preemption.py --address HEAD:6379
"""

import argparse
import datetime
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request

METADATA_URL = "http://169.254.169.254"
TIMEOUT_S = 2.0
TOKEN_SECONDS = 300
# Left for Ray itself between the end of the drain and the end of the machine.
RESERVE_S = 10.0


def notice(url: str) -> datetime.datetime | None:
    """When this machine will be taken; None where nothing is planned. Raises OSError where the service is silent."""
    request = urllib.request.Request(
        f"{url}/latest/api/token", method="PUT", headers={"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_SECONDS)}
    )
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
        token = answer.read().decode()
    request = urllib.request.Request(
        f"{url}/latest/meta-data/spot/instance-action", headers={"X-aws-ec2-metadata-token": token}
    )
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            action = json.loads(answer.read())
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise
    return datetime.datetime.fromisoformat(action["time"].replace("Z", "+00:00"))


def drain_command(address: str, seconds: float) -> list[str]:
    """The command that tells Ray that this node goes in `seconds`."""
    return [
        "ray",
        "drain-node",
        f"--address={address}",
        "--reason=DRAIN_NODE_REASON_PREEMPTION",
        "--reason-message=spot interruption notice",
        f"--deadline-remaining-seconds={max(0, int(seconds))}",
    ]


def main() -> int:
    """Watch until a notice comes, then drain this node; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--address", required=True, help="the Ray head, HOST:6379")
    parser.add_argument("--metadata-url", default=METADATA_URL, help="the instance metadata service")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two looks")
    options = parser.parse_args()
    silent = False
    while True:
        try:
            going = notice(options.metadata_url)
            silent = False
        except OSError as error:
            if not silent:
                print(f"no metadata service at {options.metadata_url} ({error}): still looking", flush=True)
            silent, going = True, None
        if going is not None:
            left_s = (going - datetime.datetime.now(datetime.UTC)).total_seconds()
            print(f"this machine goes at {going.isoformat()}, in {left_s:.0f} s: draining it", flush=True)
            return subprocess.run(drain_command(options.address, left_s - RESERVE_S)).returncode
        time.sleep(options.every)


if __name__ == "__main__":
    sys.exit(main())
