"""``sequential``: what fault-around is worth to a reader that goes through a block in order, and what it is not.

Every word of the block is read once. The adaptive window against page after page, and beside it the two honest peers
that need none of us: the warm file mapped by mmap, and the warm file copied by read(). Where the whole file lies in the
page cache of this machine and no other process needs the block, they win, and the table says by how much.
"""

from __future__ import annotations

from .bench import Bench, ClientProcess
from .figures import Pair, Row, ratio_row

GOALS = {True: 0.25, False: 0.2}
MODES = ("shared", "private")
FIXED = {"auto": "auto", "page": "4K"}


def run(bench: Bench) -> list[Row]:
    """Both modes pinned and not, then the peers."""
    rows = []
    for pinned in (False, True):
        samples = [_round(bench, pinned, number) for number in range(bench.scale.pairs)]
        where = "pinned" if pinned else "unpinned"
        for mode in MODES:
            pairs: list[Pair] = [(sample[mode, "auto"], sample[mode, "page"]) for sample in samples]
            name = f"sequential, {mode}, auto against 4K, {where}"
            rows.append(ratio_row(name, pairs, GOALS[pinned], unit="ms", labels=("auto", "4K")))
        for peer, told in (("read_mapped", "mmap of the warm file"), ("read_copied", "read() of the warm file")):
            pairs = [(sample["private", "auto"], sample["peer", peer]) for sample in samples]
            rows.append(
                ratio_row(
                    f"sequential, private auto against {told}, {where}",
                    pairs,
                    unit="ms",
                    labels=("auto", told.split()[0]),
                )
            )
    return rows


def _round(bench: Bench, pinned: bool, number: int) -> dict[tuple[str, str], float]:
    """Milliseconds of each way to read the block once, one after the other; every second round backwards."""
    bench.say(f"sequential, {'pinned' if pinned else 'unpinned'}: round {number + 1} of {bench.scale.pairs}")
    took: dict[tuple[str, str], float] = {}
    for window in list(FIXED)[:: -1 if number % 2 else 1]:
        with bench.supervisor(MODES, pinned=pinned, fault_around=FIXED[window]) as supervisor:
            for mode in MODES:
                with bench.product_client(supervisor, mode, mode, pinned=pinned) as client:
                    took[mode, window] = _milliseconds(client.ask(do="read")["span"])
    took |= {("peer", name): spent for name, spent in _peers(bench.client(pinned=pinned)).items()}
    return took


def _peers(client: ClientProcess) -> dict[str, float]:
    with client:
        return {name: _milliseconds(answer["span"]) for name, answer in client.ask(do="peers").items()}


def _milliseconds(span: list[int]) -> float:
    return (span[1] - span[0]) / 1e6
