"""``recovery``: a worker is killed with SIGKILL and its client touches a missing page at once. How long does it wait?

Every sample is a client of its own, because the second crash of one worker is answered later, on purpose.
"""

from __future__ import annotations

from .bench import Bench, worker_of
from .figures import Row, percentile, value_row

GOAL = 20.0


def run(bench: Bench) -> list[Row]:
    """Milliseconds from the signal to the byte."""
    samples = []
    count = bench.scale.of(100, 3)
    with bench.supervisor(["ram"]) as supervisor, bench.house_client(supervisor, "ram", "shared") as client:
        for number in range(count):
            if number % 25 == 0:
                bench.say(f"recovery: kill {number + 1} of {count}")
            # Pages from the end: the ones before must have been resolved by the worker that is to be killed.
            client.ask(do="touch", seed=number, count=1, pages=[number, number + 1])
            answer = client.ask(do="kill", pid=worker_of(supervisor, client.pid), page=bench.pages - 1 - number)
            samples.append(answer["ns"] / 1e6)
            client.ask(do="rejoin")
    return [
        value_row("worker killed to next fault resolved, p50", samples, "ms", GOAL, detail=f"{count} kills"),
        value_row("worker killed to next fault resolved, p99", samples, "ms", value=percentile(samples, 99)),
    ]
