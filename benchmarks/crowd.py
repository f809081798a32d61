"""Many clients at once: ``python -m benchmarks.crowd SPEC`` forks them, lets them attach together, checks their bytes.

SPEC is a JSON object: ``parent`` (pid of the harness), ``runtime_dir``, ``block``, ``clients``, ``file``. The clients
are forked from one process that has imported everything, because what is measured is attaching, not starting Python
256 times. The answer is one JSON object: ``seconds`` from the first attach's beginning to the last one's end,
``slowest`` attach, ``failed``, ``wrong``. With ``stay`` they leave only at the end of stdin.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from typing import Any, NoReturn

from postcopy_kernel.process import die_with_parent

PAGE = 4096
SAMPLE = 4


def main() -> int:
    """Fork, let go, gather."""
    spec = json.loads(sys.argv[1])
    die_with_parent(spec["parent"])
    crowd = os.getpid()
    # What a first attach would import, before the fork.
    import postcopy
    import postcopy.client  # noqa: F401

    reports, report = os.pipe()
    gate, opener = os.pipe()
    leave, keeper = os.pipe()
    children = []
    for index in range(spec["clients"]):
        child = os.fork()
        if child == 0:
            die_with_parent(crowd)
            for descriptor in (reports, opener, keeper):
                os.close(descriptor)
            _be_client(spec, index, report, gate, leave)
        children.append(child)
    for descriptor in (report, gate, leave):
        os.close(descriptor)
    os.close(opener)
    answers = _gather(reports, spec["clients"])
    print(json.dumps(_summary(answers, spec["clients"])), flush=True)
    if spec.get("stay"):
        sys.stdin.read()
    os.close(keeper)
    for child in children:
        os.waitpid(child, 0)
    return 0


def _be_client(spec: dict[str, Any], index: int, report: int, gate: int, leave: int) -> NoReturn:
    """One client: attached until all are, so that they exist at the same time."""
    import postcopy

    os.read(gate, 1)
    try:
        begun = time.monotonic_ns()
        mode = "shared" if index % 2 else "private"
        block = postcopy.attach(spec["block"], runtime_dir=spec["runtime_dir"], mode=mode, timeout=60)
        attached = time.monotonic_ns()
        wrong = _wrong(block.buf, spec["file"], index)
        os.write(report, json.dumps([begun, attached, wrong]).encode() + b"\n")
        os.read(leave, 1)
        block.close()
    except Exception as error:
        print(f"client {index}: {type(error).__name__}: {error}", file=sys.stderr)
        os._exit(1)
    os._exit(0)


def _wrong(buffer: memoryview, path: str, seed: int) -> int:
    pages = random.Random(seed).sample(range(len(buffer) // PAGE), SAMPLE)
    with open(path, "rb") as file:
        return sum(
            buffer[page * PAGE : (page + 1) * PAGE] != os.pread(file.fileno(), PAGE, page * PAGE) for page in pages
        )


def _gather(reports: int, clients: int) -> list[list[int]]:
    """One line of each client (shorter than PIPE_BUF, so no two mix); fewer when some have died."""
    answers = []
    with open(reports, encoding="utf-8") as lines:
        for line in lines:
            answers.append(json.loads(line))
            if len(answers) == clients:
                break
    return answers


def _summary(answers: list[list[int]], clients: int) -> dict[str, float]:
    if not answers:
        return {"seconds": 0.0, "slowest": 0.0, "failed": clients, "wrong": 0}
    return {
        "seconds": (max(answer[1] for answer in answers) - min(answer[0] for answer in answers)) / 1e9,
        "slowest": max(answer[1] - answer[0] for answer in answers) / 1e9,
        "failed": clients - len(answers),
        "wrong": sum(answer[2] > 0 for answer in answers),
    }


if __name__ == "__main__":
    sys.exit(main())
