"""Which address of this machine other nodes reach, and on which interface it is."""

from __future__ import annotations

import errno
import socket
import struct
import sys
import time
from ipaddress import ip_address

from accelx.errors import SpawnError

SIOCGIFADDR = 0x8915  # linux/sockios.h: the IPv4 address of an interface
NOT_HERE = {errno.EADDRNOTAVAIL, errno.EADDRINUSE}
RETRY = 0.2  # seconds


def listen(host: str, port: int) -> socket.socket | None:
    """A socket on that address of this machine; None where it is another's or taken.

    A name that this machine takes for its own loopback, as Debian's /etc/hosts has it,
    is one that others reach it by: then it listens on all interfaces.
    """
    address = resolve(host, port)
    if is_loopback(address) and not _means_loopback(host):
        address = "::" if ":" in address else "0.0.0.0"
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        return socket.create_server((address, port), family=family, backlog=1024)
    except OSError as error:
        if error.errno in NOT_HERE:
            return None
        raise


def resolve(host: str, port: int) -> str:
    """The address of a name. Raises SpawnError for one that is unknown."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise SpawnError(
            f"--rendezvous wants a name or address of a node, and {host!r} has no "
            f"address here ({error.strerror}); write the address, or mend the name"
        ) from error
    return str(found[0][4][0])


def reach(host: str, port: int, seconds: float) -> str:
    """This machine's own address towards that one, when it answers.

    Raises SpawnError where nobody answers within `seconds`.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            with socket.create_connection((host, port), timeout=5) as there:
                own = str(there.getsockname()[0])
        except OSError as error:
            if time.monotonic() > deadline:
                raise SpawnError(
                    f"nobody answers at --rendezvous {host}:{port} within "
                    f"{seconds:g} s ({error.strerror or error}); start the node of "
                    "that address, open the port between nodes, or write another"
                ) from error
            time.sleep(RETRY)
        else:
            return host if is_loopback(own) and not _means_loopback(host) else own


def interface_of(address: str) -> str:
    """The name of the network interface that has it; empty where that is unknown."""
    if sys.platform != "linux":
        return ""
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(asked.fileno(), SIOCGIFADDR, request)
            except OSError:  # it has no IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return ""


def is_loopback(address: str) -> bool:
    """Whether an address is seen by its own machine alone."""
    try:
        return ip_address(address).is_loopback
    except ValueError:  # a name
        return False


def _means_loopback(host: str) -> bool:
    return host == "localhost" or is_loopback(host)
