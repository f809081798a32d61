"""Events: one line each, whoever chose the words in it, and a history that is bounded."""

from __future__ import annotations

import json
import logging
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopy_supervisor.event_log import FIELDS, LENGTH, MOST_TEXT, Event, EventLog

LINE = re.compile(r'(?P<text>.*) event=(?P<kind>\S+)(?P<fields>( [a-z]+=([A-Za-z0-9_.:/+-]+|"([^"\\]|\\.)*"))*)')


@given(
    kind=st.sampled_from(("lost", "restart", "pause")),
    detail=st.text(),
    where=st.dictionaries(st.sampled_from(FIELDS), st.one_of(st.integers(0, 1 << 64), st.text())),
)
def test_every_event_is_one_line_that_can_be_read_back(kind: str, detail: str, where: dict[str, int | str]) -> None:
    history = EventLog()
    logging.disable()
    try:
        history.record(kind, detail, **where)
    finally:
        logging.disable(logging.NOTSET)
    (event,) = history
    line = event.line()
    assert line.isprintable() and len(line.splitlines()) == 1
    match = LINE.fullmatch(line)
    assert match and match["kind"] == kind and match["text"].startswith(f"{kind}: ")
    found = dict(re.findall(r' ([a-z]+)=("(?:[^"\\]|\\.)*"|\S+)', match["fields"]))
    assert list(found) == [key for key in FIELDS if key in where]
    for key, text in found.items():
        assert (json.loads(text) if text[0] == '"' else text) == str(event.where[key])


def test_what_a_hostile_name_looks_like() -> None:
    history = EventLog()
    history.record("lost", "gone\n2026 INFO \x1b[31mforged", client=3, cause='a "b" \\\r\n' + "x" * 5000)
    (event,) = history
    assert event.line().startswith("lost: gone\\n2026 INFO \\x1b[31mforged event=lost client=3 cause=")
    assert len(event.where["cause"] if isinstance(event.where["cause"], str) else "") <= MOST_TEXT + 2
    assert event.document()["client"] == 3


def test_the_history_is_bounded_and_goes_on_counting(caplog: pytest.LogCaptureFixture) -> None:
    history = EventLog()
    for number in range(LENGTH + 10):
        history.record("restart", f"worker {number}", worker=number, cause="signal SIGKILL")
    told = list(history.documents())
    assert len(told) == LENGTH and [told[at]["number"] for at in (0, -1)] == [11, LENGTH + 10]
    assert list(history.documents(after=LENGTH + 9)) == told[-1:]
    assert history.counts == {"restart": LENGTH + 10}
    assert caplog.records[0].getMessage() == 'restart: worker 0 event=restart worker=0 cause="signal SIGKILL"'


def test_which_pages_an_event_concerns() -> None:
    page = Event(1, 0.0, "lost", "", {"block": "a", "offset": 8192, "length": 4096})
    assert page.concerns("a", 8192, 12288) and page.concerns("a", 0, 8193)
    assert (
        not page.concerns("a", 0, 8192) and not page.concerns("a", 12288, 16384) and not page.concerns("b", 8192, 9000)
    )
    assert Event(1, 0.0, "complete", "", {"block": "a"}).concerns("a", 0, 1), "the whole block"
    assert not Event(1, 0.0, "pause", "", {}).concerns("a", 0, 1)
