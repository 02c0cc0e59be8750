"""A private sshd on loopback: own keys, own configuration, nothing of the machine's touched.

It lets in whoever runs the tests, with a throwaway key, and gives the session exactly the environment asked for,
so that a test decides which home folder and which programs the remote host has.
"""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from peers import LOOPBACK, end_process, process_alive, wait_until

ALIAS = "far-host"              # a host alias that only our ssh configuration knows
DEAD_ALIAS = "closed-host"      # one whose port refuses
START_ATTEMPTS = 5              # the free port found may be taken before sshd binds it
START_SECONDS = 10.0

_SERVER_CONFIG = """\
Port {port}
ListenAddress {host}
HostKey {directory}/host_key
PidFile {directory}/sshd.pid
AuthorizedKeysFile {directory}/client_key.pub
PubkeyAuthentication yes
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin yes
StrictModes no
UsePAM no
UseDNS no
PrintMotd no
PrintLastLog no
X11Forwarding no
MaxStartups 100
SetEnv {environment}
ForceCommand cd; {login}
"""

# A login to a home of its own: as sshd would do it, except that it starts in the folder that HOME names.
LOGIN = 'if [ -n "$SSH_ORIGINAL_COMMAND" ]; then exec "$SHELL" -c "$SSH_ORIGINAL_COMMAND"; else exec "$SHELL" -l; fi'

_CLIENT_CONFIG = """\
Host {alias}
    Port {port}
Host {dead_alias}
    Port {dead_port}
Host {alias} {dead_alias}
    HostName {host}
    User {user}
    IdentityFile {directory}/client_key
    IdentitiesOnly yes
    UserKnownHostsFile {directory}/known_hosts
    GlobalKnownHostsFile /dev/null
    StrictHostKeyChecking yes
    BatchMode yes
    ConnectTimeout 10
    LogLevel ERROR
"""


@dataclass(frozen=True)
class Sshd:
    """A running sshd and how to reach it."""

    port: int
    pid: int
    config: Path                        # for `ssh -F`
    log: Path

    @property
    def ssh(self) -> list[str]:
        """The ssh command as words; the alias and a command follow."""
        return ["ssh", "-F", str(self.config)]


@contextmanager
def running_sshd(
    directory: Path, environment: Mapping[str, str], *, login: str = LOGIN, extra_config: str = ""
) -> Iterator[Sshd]:
    """An sshd for the length of a `with` block. `environment` is what each session gets on top of sshd's own.

    login: shell text that is run for a session. extra_config: lines for sshd that come first, and so count.
    directory: a private directory without blanks in its path, which gets the keys, configurations and log.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)      # where sshd of root jails its unprivileged half
    for name in ("host_key", "client_key"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "throwaway", "-f", str(directory / name)],
            check=True, stdin=subprocess.DEVNULL, timeout=START_SECONDS,
        )
    process, port = _start(directory, environment, login, extra_config)
    try:
        yield Sshd(port=port, pid=process.pid, config=_write_client_config(directory, port), log=directory / "log")
    finally:
        for pid in (*_children(process.pid), process.pid):
            end_process(pid)
        process.wait(timeout=START_SECONDS)


def _start(
    directory: Path, environment: Mapping[str, str], login: str, extra_config: str
) -> tuple[subprocess.Popen[bytes], int]:
    """Start sshd in the foreground on a free port; returns once it accepts connections."""
    program = shutil.which("sshd", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin")
    if program is None:
        raise FileNotFoundError("sshd is not installed")
    for _ in range(START_ATTEMPTS):
        port = _free_port()
        config = directory / "sshd_config"
        config.write_text(
            extra_config + _SERVER_CONFIG.format(
                port=port, host=LOOPBACK, directory=directory, login=login,
                environment=" ".join(_quoted(f"{name}={value}") for name, value in environment.items()),
            ),
            encoding="utf-8",
        )
        process = subprocess.Popen(
            [program, "-D", "-f", str(config), "-E", str(directory / "log")],
            stdin=subprocess.DEVNULL, start_new_session=True,
        )
        if _listens(process, port):
            return process, port
    raise RuntimeError(f"sshd does not start:\n{(directory / 'log').read_text(encoding='utf-8', errors='replace')}")


def _listens(process: subprocess.Popen[bytes], port: int) -> bool:
    """Wait until sshd accepts connections (true) or has given up (false)."""
    wait_until(lambda: process.poll() is not None or _accepts(port), START_SECONDS, "sshd to listen")
    return process.poll() is None


def _write_client_config(directory: Path, port: int) -> Path:
    host_key = (directory / "host_key.pub").read_text(encoding="ascii")
    (directory / "known_hosts").write_text(f"[{LOOPBACK}]:{port} {host_key}", encoding="ascii")
    config = directory / "ssh_config"
    config.write_text(
        _CLIENT_CONFIG.format(
            alias=ALIAS, dead_alias=DEAD_ALIAS, port=port, dead_port=_free_port(), host=LOOPBACK,
            user=pwd.getpwuid(os.geteuid()).pw_name, directory=directory,
        ),
        encoding="utf-8",
    )
    return config


def _quoted(word: str) -> str:
    """A word of sshd's configuration language."""
    if '"' in word or "\n" in word:
        raise ValueError(f"sshd cannot be told {word!r}")
    return f'"{word}"'


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.bind((LOOPBACK, 0))
        return int(sock.getsockname()[1])


def _accepts(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        return sock.connect_ex((LOOPBACK, port)) == 0


def _children(pid: int) -> Sequence[int]:
    """Sessions of this sshd that still run, where the system lists them."""
    try:
        words = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    except OSError:
        return ()
    return tuple(int(word) for word in words if process_alive(int(word)))
