"""Records of the workers that run: one small file each in the runtime directory.

When supervisor and custodian die together, workers may go on. The next supervisor, which rescues their clients, must
end them first: of two workers that read one userfaultfd each would get a part of the messages."""

from __future__ import annotations

import logging
import os

from postcopy_kernel import other_process
from postcopy_protocol.runtime_paths import RESCUE

log = logging.getLogger("postcopy.custodian")


class LifeRecords:
    """Files ``worker-N`` with ``PID START BOOT``, for the last process of each worker. The supervisor removes them."""

    def __init__(self, directory: str) -> None:
        self._directory = os.path.join(directory, RESCUE)
        self._boot = other_process.boot_id()

    def write(self, worker: int, pid: int) -> None:
        """Note that ``pid`` is this worker's process. Failures are logged: a full disk stops no worker."""
        try:
            line = f"{pid} {other_process.start_time(pid)} {self._boot}\n".encode()
            path = os.path.join(self._directory, f"worker-{worker}")
            file = os.open(path + ".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                done = os.write(file, line)
            finally:
                os.close(file)
            if done == len(line):
                os.rename(path + ".new", path)
        except OSError as error:
            log.warning("worker %d is not recorded: %s", worker, error)
