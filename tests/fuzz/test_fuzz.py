"""A short run of the fuzzer (``python -m tests.fuzz`` runs longer ones), and that it can find something."""

from __future__ import annotations

import pytest

from postcopy_protocol.attach_conversation import FROM_CLIENT
from tests.fuzz import __main__ as fuzz


@pytest.mark.parametrize("seed", range(2))
def test_nothing_breaks_a_listener(seed: int) -> None:
    fuzzer = fuzz.Fuzzer(seed)
    try:
        for _ in range(15_000):
            fuzzer.one()
    finally:
        fuzzer.close()
    for listener in fuzzer.listeners:
        assert fuzzer.outcomes[f"{listener}: taken"] > 20, f"{listener}: too little of it is in order"
        assert fuzzer.outcomes[f"{listener}: refused"] > 300, listener
    # Words on the return path mean little before a stream listens and something is asked for.
    assert fuzzer.source.express > 20 and fuzzer.supervisor.express > 20, "the express road is hardly met"
    assert fuzzer.supervisor.placed > 40, "few pages are placed"


def test_a_listener_that_breaks_is_found() -> None:
    fuzzer = fuzz.Fuzzer(1)

    def fragile(data: bytes) -> None:
        raise IndexError(data[0])

    fuzzer.listeners = {"fragile": (fragile, FROM_CLIENT)}
    try:
        with pytest.raises(AssertionError, match="fragile broke on"):
            fuzzer.one()
    finally:
        fuzzer.close()
