"""Two machines and the networks between them, in network namespaces that a test makes itself (Linux, root).

    client machine == link 0, link 1 ... == server machine, which also has addresses that no link changes

The client's end of a link is plugged in and out; the server always finds its way back over the link's own subnet.
Every address is fixed, so a test can say which one it expects. Numbers of links start at 0.
"""

from __future__ import annotations

import itertools
import json
import os
import select
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from peers import wait_until

SERVER_4, SERVER_6 = "192.0.2.1", "2001:db8::1"
OTHER_SERVER_4 = "192.0.2.2"
COMMAND_SECONDS = 20.0

_serial = itertools.count()

# Tells of every UDP datagram to or from the port: the time, the direction, both addresses and the size of its payload.
_WATCH = """
import json, socket, struct, sys, time
port = int(sys.argv[1])
tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
print("ready", flush=True)
while True:
    frame, (name, _, kind, *_) = tap.recvfrom(4096)
    family = {0x0800: socket.AF_INET, 0x86DD: socket.AF_INET6}.get(int.from_bytes(frame[12:14], "big"))
    if family == socket.AF_INET and frame[23] == 17:
        at, source, target = 14 + 4 * (frame[14] & 15), frame[26:30], frame[30:34]
    elif family == socket.AF_INET6 and frame[20] == 17:
        at, source, target = 54, frame[22:38], frame[38:54]
    else:
        continue
    ports = struct.unpack_from(">HH", frame, at)
    if name != "lo" and port in ports:
        up = ports[1] == port
        addresses = [socket.inet_ntop(family, address) for address in (source, target)]
        print(json.dumps([time.monotonic(), up, *addresses, ports[not up], len(frame) - at - 8]), flush=True)
"""


class Seen:
    """One datagram as the server's machine saw it."""

    def __init__(self, at: float, up: bool, source: str, target: str, client_port: int, size: int) -> None:
        self.at = at
        self.up = up  # from the client
        self.source = source
        self.target = target
        self.client_port = client_port
        self.size = size

    def __repr__(self) -> str:
        return f"{self.at:.3f} {self.source} > {self.target} ({self.size} bytes, client's port {self.client_port})"


class Networks:
    """The machines and links; `with Networks() as networks` takes them all away again."""

    def __init__(self, links: int = 2) -> None:
        stem = f"mosh-{os.getpid()}-{next(_serial)}"
        self.client, self.server = f"{stem}-c", f"{stem}-s"
        self._made: list[str] = []
        try:
            for name in (self.client, self.server):
                _run("ip", "netns", "add", name)
                self._made.append(name)
                self._ip(name, "link set lo up")
            self._ip(
                self.server,
                f"addr add {SERVER_4}/32 dev lo", f"addr add {SERVER_6}/128 dev lo nodad",
            )
            for number in range(links):
                self.lay(number)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Networks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take everything away; the links go with their ends."""
        for name in self._made:
            _run("ip", "netns", "delete", name)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)
        self._made.clear()

    # -- what changes

    def lay(self, link: int) -> None:
        """Connect the two machines by a link; the client's end has still to be plugged in."""
        _run("ip", "link", "add", f"link{link}", "netns", self.client, "type", "veth",
             "peer", "name", f"link{link}", "netns", self.server)  # fmt: skip
        self._ip(
            self.server,
            f"link set link{link} up",
            f"addr add 10.0.{link}.254/24 dev link{link}",
            f"addr add fd00:{link}::254/64 dev link{link} nodad",
            f"addr add fe80::254/64 dev link{link} nodad",
        )

    def remove(self, link: int) -> None:
        """Take a link away, with the interfaces at both of its ends."""
        self._ip(self.client, f"link delete link{link}")

    def plug_in(self, link: int, families: str = "46", host: int = 1) -> None:
        """Connect the client to a link, with an address and a default route in each of the families named."""
        lines = [f"link set link{link} up"]
        if "4" in families:
            lines += [f"addr add 10.0.{link}.{host}/24 dev link{link}", f"route replace default via 10.0.{link}.254"]
        if "6" in families:
            lines += [f"addr add fe80::{host}/64 dev link{link} nodad",
                      f"addr add fd00:{link}::{host}/64 dev link{link} nodad",
                      f"route replace ::/0 via fd00:{link}::254"]  # fmt: skip
        self._ip(self.client, *lines)

    def unplug(self, link: int) -> None:
        """Disconnect the client from a link: its addresses and routes there are gone."""
        self._ip(self.client, f"addr flush dev link{link}", f"link set link{link} down")

    def on_client(self, *lines: str) -> None:
        """Change something on the client's machine, in the words of ip."""
        self._ip(self.client, *lines)

    def on_server(self, *lines: str) -> None:
        """Change something on the server's machine, in the words of ip."""
        self._ip(self.server, *lines)

    def name_server(self, name: str, *addresses: str) -> None:
        """Let `name` mean these addresses on the client's machine, from now on."""
        directory = Path("/etc/netns") / self.client
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / "hosts").open("w") as hosts:  # in place, since it is bound into the running processes' view
            hosts.write("".join(f"{address} {name}\n" for address in addresses))
        (directory / "nsswitch.conf").write_text("hosts: files\n")

    # -- what runs there

    def words(self, machine: str, *command: str) -> list[str]:
        """The words that run a command on one of the machines."""
        return ["ip", "netns", "exec", machine, *command]

    @contextmanager
    def watching(self, port: int) -> Iterator[Watcher]:
        """Watch what passes between the client and this port of the server."""
        command = self.words(self.server, sys.executable, "-c", _WATCH, str(port))
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        watcher = Watcher(process)
        try:
            yield watcher
        finally:
            process.kill()
            process.wait()
            watcher.close()

    def _ip(self, machine: str, *lines: str) -> None:
        _run("ip", "-netns", machine, "-batch", "-", input_text="\n".join(lines) + "\n")


class Watcher:
    """What has passed on the links."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        self._pipe = process.stdout
        self._pipe.readline()
        os.set_blocking(self._pipe.fileno(), False)
        self._rest = b""
        self._seen: list[Seen] = []

    def close(self) -> None:
        """Let go of the pipe."""
        self._pipe.close()

    def seen(self, since: float = 0.0) -> list[Seen]:
        """All datagrams since a time of `time.monotonic`."""
        more = os.read(self._pipe.fileno(), 1 << 20) if self._waiting() else b""
        *lines, self._rest = (self._rest + more).split(b"\n")
        self._seen += [Seen(*json.loads(line)) for line in lines]
        return [one for one in self._seen if one.at >= since]

    def _waiting(self) -> bool:
        return bool(select.select([self._pipe], [], [], 0)[0])

    def wait_first(self, since: float, dead: Collection[str] = ()) -> Seen:
        """The first datagram of the client since a time that does not go to one of the dead addresses."""
        wait_until(lambda: bool(self._sent(since, dead)), COMMAND_SECONDS, "a datagram")
        return self._sent(since, dead)[0]

    def _sent(self, since: float, dead: Collection[str]) -> list[Seen]:
        return [one for one in self.seen(since) if one.up and one.target not in dead]


def unavailable() -> str:
    """Why there can be no namespaces here; empty if there can."""
    if not sys.platform.startswith("linux") or shutil.which("ip") is None:
        return "network namespaces need Linux and the program ip"
    name = f"mosh-{os.getpid()}-probe"
    try:
        _run("ip", "netns", "add", name)
        _run("ip", "-netns", name, "link", "add", "probe", "type", "veth")
    except RuntimeError as error:
        return f"this user cannot make network namespaces ({str(error).strip()})"
    finally:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
    return ""


def _run(*words: str, input_text: str | None = None) -> None:
    finished = subprocess.run(
        words, input=input_text, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False
    )
    if finished.returncode:
        raise RuntimeError(f"{' '.join(words)}: {finished.stderr.strip()} {input_text or ''}")
