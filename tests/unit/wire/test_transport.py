"""Which transport is used: the option, else the environment, else native sockets."""

from __future__ import annotations

import pytest

from postcopy_protocol.errors import BadInput
from postcopy_sources import settings as source_settings
from postcopy_supervisor import settings as supervisor_settings
from postcopy_wire.transport import LIBZMQ, NATIVE, VARIABLE, chosen_transport


def test_the_option_then_the_environment_then_native() -> None:
    assert chosen_transport(None, {}) == NATIVE
    assert chosen_transport(None, {VARIABLE: ""}) == NATIVE
    assert chosen_transport(None, {VARIABLE: LIBZMQ}) == LIBZMQ
    assert chosen_transport(NATIVE, {VARIABLE: LIBZMQ}) == NATIVE


def test_an_unknown_transport_of_the_environment_is_refused() -> None:
    with pytest.raises(BadInput, match=f"{VARIABLE}='tcp' is no transport: write native or libzmq"):
        chosen_transport(None, {VARIABLE: "tcp"})


def test_both_programs_take_the_option_and_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    supervisor, source = ["ram0=/etc/passwd"], ["ram0=/etc/passwd", "--listen", "ipc:///tmp/x"]
    assert supervisor_settings.parse(supervisor).transport == source_settings.parse(source).transport == NATIVE
    option = ["--transport", "libzmq"]
    assert supervisor_settings.parse([*supervisor, *option]).transport == LIBZMQ
    assert source_settings.parse([*source, *option]).transport == LIBZMQ
    monkeypatch.setenv(VARIABLE, "libzmq")
    assert supervisor_settings.parse(supervisor).transport == source_settings.parse(source).transport == LIBZMQ
    monkeypatch.setenv(VARIABLE, "x")
    for parse, arguments in ((supervisor_settings.parse, supervisor), (source_settings.parse, source)):
        with pytest.raises(BadInput):
            parse(arguments)
