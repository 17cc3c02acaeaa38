"""Free ports of this machine, and whether something listens at an address."""

import socket


def free_ports(count: int) -> list[int]:
    """Distinct free ports on loopback."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def why_unreachable(address: str, timeout_s: float) -> str:
    """Why nothing listens at a cluster's address; empty where something does, or where the address has no port.

    Ray itself tries for two minutes to reach a cluster that is not there; a connection attempt shows it at once.
    """
    host, separator, port = address.removeprefix("ray://").removeprefix("http://").rstrip("/").rpartition(":")
    if not separator:
        return ""  # "auto" and the like
    try:
        socket.create_connection((host, int(port)), timeout=timeout_s).close()
    except (OSError, ValueError) as error:
        return str(error)
    return ""
