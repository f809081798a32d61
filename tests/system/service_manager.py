"""A service manager with a descriptor store, as far as sd_pid_notify_with_fds(3) and sd_listen_fds(3) describe one."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

from postcopy_kernel.descriptors import close_all, receive_message, send_message
from tests.system.service import until

LAUNCH = """
import array, os, socket, sys
drop = {drop}
asked = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
asked.connect({path!r})
asked.setblocking(True)
data, more, _, _ = asked.recvmsg(65536, socket.CMSG_SPACE(4 * 253))
fds = array.array("i")
for _, _, payload in more:
    fds.frombytes(payload)
high = [os.dup2(fd, 500 + at) for at, fd in enumerate(fds)]
for at, fd in enumerate(high):
    os.dup2(fd, 3 + at)
    os.close(fd)
os.closerange(3 + len(high), 400)
if drop:
    import prctl
    prctl.cap_effective.limit(); prctl.cap_permitted.limit(); prctl.cap_inheritable.limit()
    for cap in prctl.ALL_CAPS:
        try: prctl.capbset_drop(cap)
        except PermissionError: pass
os.environ |= {{"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(high)), "LISTEN_FDNAMES": data.decode()}}
os.execv(sys.executable, [sys.executable, "-m", "postcopy_supervisor", *sys.argv[1:]])
"""


class ServiceManager:
    """Stores what is sent to ``notify``; ``program`` runs a supervisor that is handed all of it."""

    def __init__(self, directory: Path) -> None:
        self.notify, self.launch = directory / "notify", directory / "launch"
        self.stored: dict[str, int] = {}
        self.texts: list[str] = []
        self._inbox = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._inbox.bind(str(self.notify))
        self._launching = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._launching.bind(str(self.launch))
        self._launching.listen(4)
        self._thread = threading.Thread(target=self._receive, daemon=True)
        self._thread.start()

    def environment(self) -> dict[str, str]:
        return {"NOTIFY_SOCKET": str(self.notify), "FDSTORE": "64"}

    def _receive(self) -> None:
        while True:
            received = receive_message(self._inbox, wait=True)
            text = received.data.decode()
            if text == "end":
                return
            self.texts.append(text)
            lines = dict(line.split("=", 1) for line in text.splitlines())
            name = lines.get("FDNAME", "stored")
            if lines.get("FDSTORE") == "1":
                assert lines["FDPOLL"] == "0" and ":" not in name and len(name) < 256 and len(received.fds) == 1
                assert name not in self.stored, "it is removed before another takes its name"
                self.stored[name] = received.fds[0]
            elif lines.get("FDSTOREREMOVE") == "1":
                close_all(filter(None, (self.stored.pop(name, None),)))

    def program(self, *, unprivileged: bool) -> tuple[str, ...]:
        """For ``Service.start``: the supervisor, with the store's descriptors from 3 on."""
        threading.Thread(target=self._hand_over, daemon=True).start()
        return ("-c", LAUNCH.format(path=str(self.launch), drop=unprivileged))

    def _hand_over(self) -> None:
        connection, _ = self._launching.accept()
        with connection:
            send_message(connection, ":".join(self.stored).encode(), list(self.stored.values()), wait=True)

    def has(self, *names: str) -> None:
        """These are stored, and nothing else but worker zero's figures."""
        until(lambda: set(self.stored) - {"client-0.0"} == set(names), f"just these are stored: {names}")

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as last:
            last.sendto(b"end", str(self.notify))
        self._thread.join(10)
        close_all(self.stored.values())
        for one in (self._inbox, self._launching):
            one.close()
        for path in (self.notify, self.launch):
            path.unlink()
