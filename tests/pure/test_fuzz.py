"""A short run of the fuzzer (``python -m tests.fuzz`` runs longer ones), and that it can find something."""

from __future__ import annotations

import pytest

from postcopy_protocol.door import FROM_CLIENT
from tests import fuzz


@pytest.mark.parametrize("seed", range(4))
def test_nothing_breaks_a_listener(seed: int) -> None:
    fuzzer = fuzz.Fuzzer(seed)
    for _ in range(10_000):
        fuzzer.one()
    for listener in fuzzer.listeners:
        assert fuzzer.outcomes[f"{listener}: taken"] > 20, "too little of it is in order"
        assert fuzzer.outcomes[f"{listener}: refused"] > 500


def test_a_listener_that_breaks_is_found() -> None:
    fuzzer = fuzz.Fuzzer(1)

    def fragile(data: bytes) -> None:
        raise IndexError(data[0])

    fuzzer.listeners = {"fragile": (fragile, FROM_CLIENT)}
    with pytest.raises(AssertionError, match="fragile broke on"):
        fuzzer.one()
