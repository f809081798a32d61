"""What a person wants to see when a round has found something, taken while everybody is still there."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from pathlib import Path

from tests.chaos.progress import Progress
from tests.chaos.stage import Stage


def keep(stage: Stage, table: Progress) -> None:
    """Status, every thread's place in the kernel, gauges of userfaultfds, every client's Python stack and row."""
    with contextlib.suppress(OSError):
        (stage.directory / "status.json").write_text(json.dumps(stage.watcher.document, indent=1))
        lines = [f"seat {seat}: {list(table.row(seat))}" for seat in stage.clients]
        (stage.directory / "progress.txt").write_text("\n".join(lines) + "\n")
        people = stage.people()
        text = "".join(_process(pid, name) for pid, name in sorted(people.items()))
        (stage.directory / "processes.txt").write_text(text)
        for client in stage.clients.values():  # faulthandler writes the stack to its .err file
            if client.process.poll() is None and not client.killed:
                client.process.send_signal(signal.SIGCONT)
                client.process.send_signal(signal.SIGUSR1)
        time.sleep(0.5)


def _process(pid: int, name: str) -> str:
    asked = [f"=== {pid} {name}: {_read(f'/proc/{pid}/cmdline')[:200]}"]
    with contextlib.suppress(OSError):
        for thread in sorted(Path(f"/proc/{pid}/task").iterdir()):
            where, stack = _read(f"{thread}/wchan"), _read(f"{thread}/stack").split("\n")
            asked.append(f"  thread {thread.name} {_read(f'{thread}/comm').strip()} in {where}: {' '.join(stack[:6])}")
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                target = str(entry.readlink())
                asked.append(f"  {entry.name} -> {target}")
                if "userfaultfd" in target:
                    asked.append("    " + " ".join(_read(f"/proc/{pid}/fdinfo/{entry.name}").split()))
    return "\n".join(asked) + "\n"


def _read(path: str) -> str:
    try:
        return Path(path).read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
    except OSError:
        return ""
