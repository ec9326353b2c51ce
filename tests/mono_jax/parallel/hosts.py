"""Separate hosts on this machine: network namespaces joined by a bridge, if the machine permits them."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator

import pytest

NETWORK = "10.213.77"


class Hosts:
    """``count`` hosts, number n with the address NETWORK.(n + 1), which is also its name."""

    def __init__(self, count: int):
        self._name = f"mj{os.getpid()}"
        self.addresses = [f"{NETWORK}.{number + 1}" for number in range(count)]

    def _ip(self, *arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)

    def start(self) -> None:
        """Raises OSError or CalledProcessError if this is not permitted."""
        self._ip("link", "add", self._name, "type", "bridge")
        self._ip("link", "set", self._name, "up")
        for number, address in enumerate(self.addresses):
            host, cable = f"{self._name}-{number}", f"{self._name}c{number}"
            self._ip("netns", "add", host)
            self._ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", host)
            self._ip("link", "set", cable, "master", self._name, "up")
            self._ip("-n", host, "address", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                self._ip("-n", host, "link", "set", device, "up")

    def stop(self) -> None:
        for number in range(len(self.addresses)):
            with contextlib.suppress(subprocess.CalledProcessError):
                self._ip("netns", "delete", f"{self._name}-{number}")
        with contextlib.suppress(subprocess.CalledProcessError):
            self._ip("link", "delete", self._name)

    def cut_off(self, number: int) -> None:
        """Pulls the network cable of a host: traffic stops without notice to anyone."""
        self._ip("link", "set", f"{self._name}c{number}", "down")

    def command(self, number: int) -> list[str]:
        """Command prefix that starts a command on a host."""
        named = 'hostname "$0" && exec "$@"'
        entered = ["ip", "netns", "exec", f"{self._name}-{number}", "unshare", "--uts"]
        return [*entered, "sh", "-c", named, self.addresses[number]]


@contextlib.contextmanager
def hosts(count: int) -> Iterator[Hosts]:
    """Skips the test if the machine does not permit making hosts."""
    made = Hosts(count)
    try:
        made.start()
        for number in range(count):
            subprocess.run([*made.command(number), "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        made.stop()
        pytest.skip(f"no network namespaces here: {error}")
    try:
        yield made
    finally:
        made.stop()
