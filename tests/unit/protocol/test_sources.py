"""SOURCE as a person types it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postcopy_protocol.errors import BadInput
from postcopy_protocol.sources import (
    FileSource,
    HandlerSource,
    RemoteSource,
    Source,
    StoreSource,
    ZeroSource,
    is_block_name,
    parse_block_name,
    parse_named,
    parse_source,
)

quick = settings(deadline=None)
NEAR = RemoteSource("tcp://a:1", "ram0")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("peers:tcp://a:1/ram0", "index there"),
        ("peers:,store:/x/vm1", "no source"),
        ("peers:a.bin,store:/x/vm1", "peers:tcp://"),
        ("peers:tcp://a:1/r,tcp://a:1/r,store:/x/vm1", "peers:tcp://"),
        ("peers:tcp://a/r,store:/x/vm1", "PORT"),
        ("peers:tcp://a:1/r,store:s3://key:secret@b/vm1", "do not belong"),
        ("peers:" + "".join(f"tcp://a:{port}/r," for port in range(1, 18)) + "store:/x/vm1", "16 peers"),
    ],
)
def test_peers_that_cannot_be(text: str, why: str) -> None:
    with pytest.raises(BadInput, match=why) as refused:
        parse_source(text)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("weights.bin", FileSource("weights.bin")),
        ("/a/b=c", FileSource("/a/b=c")),
        ("./zero:4K", FileSource("./zero:4K")),
        ("file:///a%20b", FileSource("/a b")),
        ("zero:1G", ZeroSource(1 << 30)),
        ("handler:pkg.mod:make?size=64M", HandlerSource("pkg.mod", "make", 64 << 20)),
        ("ipc:///run/x/source/ram0", RemoteSource("ipc:///run/x/source", "ram0")),
        ("tcp://host:5555/ram0", RemoteSource("tcp://host:5555", "ram0")),
        ("tcp://[::1]:5555/ram0", RemoteSource("tcp://[::1]:5555", "ram0")),
        ("store:s3://bucket/a/b/vm1", StoreSource("s3://bucket/a/b", "vm1")),
        ("store:s3://bucket/vm1.caibx", StoreSource("s3://bucket", "vm1")),
        ("store:/srv/snapshots/vm1", StoreSource("/srv/snapshots", "vm1")),
        ("store:/vm1", StoreSource("/", "vm1")),
        ("store:vm1", StoreSource(".", "vm1")),
        (
            "peers:tcp://a:1/ram0,ipc:///b/r,store:/x/vm1",
            StoreSource("/x", "vm1", (NEAR, RemoteSource("ipc:///b", "r"))),
        ),
        ("peers:tcp://a:1/ram0,store:/a,b/vm1", StoreSource("/a,b", "vm1", (NEAR,))),
        ("store:https://host:8080/x/vm1", StoreSource("https://host:8080/x", "vm1")),
    ],
)
def test_sources(text: str, source: Source) -> None:
    assert parse_source(text) == source
    assert parse_source(str(source)) == source
    assert parse_named(f"ram0={text}") == ("ram0", source)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a\0b",
        "zero:",
        "zero:0",
        "zero:-1",
        "handler:mod:f",
        "handler:mod:f?size=0",
        "handler:mod:f?length=4K",
        "handler:mod?size=4K",
        "handler::f?size=4K",
        "handler:a..b:f?size=4K",
        "handler:os;x:f?size=4K",
        "handler:mod:f:g?size=4K",
        "file:weights.bin",
        "file://host/x",
        "file:///a%00b",
        "ipc://ram0",
        "ipc://@abstract/ram0",
        "ipc:///ram0/",
        "tcp://host/ram0",
        "tcp://host:0/ram0",
        "tcp://host:65536/ram0",
        "tcp://:5/ram0",
        "tcp://host:5/-x",
        "https://host/weights.bin",
    ],
)
def test_what_is_no_source(text: str) -> None:
    with pytest.raises(BadInput) as caught:
        parse_source(text)
    assert "\n" not in str(caught.value)


@quick
@given(
    st.text(max_size=40)
    | st.tuples(
        st.sampled_from(("file:///", "handler:", "zero:", "ipc:///", "tcp://")),
        st.text("ab:/?=.%01size4K[]", max_size=30),
    ).map("".join)
)
def test_any_text_is_a_source_that_says_itself_or_bad_input(text: str) -> None:
    try:
        source = parse_source(text)
    except BadInput:
        return
    assert parse_source(str(source)) == source


@pytest.mark.parametrize("name", ["a", "0", "ram0", "A.b_c-d", "x" * 64])
def test_names(name: str) -> None:
    assert parse_block_name(name) == name


@pytest.mark.parametrize("name", ["", ".a", "-a", "_a", "a/b", "a b", "a\n", "ä", "a=b", "x" * 65, ".."])
def test_what_is_no_name(name: str) -> None:
    assert not is_block_name(name)
    with pytest.raises(BadInput):
        parse_block_name(name)


def test_a_named_source_has_a_name() -> None:
    for text in ("weights.bin", "=weights.bin", "a b=weights.bin", "ram0="):
        with pytest.raises(BadInput):
            parse_named(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "s3://",
        "s3://bucket",
        "s3:///x/y",
        "ftp://host/x/y",
        "s3://b/-x",
        "s3://b/x y",
        "a/..",
        "/",
        "s3://b/" + "x" * 65,
    ],
)
def test_places_that_hold_no_snapshot(text: str) -> None:
    with pytest.raises(BadInput):
        parse_source(f"store:{text}")


@pytest.mark.parametrize(
    "text", ["s3://KEY:SECRET@bucket/p/vm1", "https://host/p/vm1?sig=SECRET", "az://c/SECRET@x/vm1#SECRET"]
)
def test_a_url_with_a_secret_is_refused_and_not_shown(text: str) -> None:
    with pytest.raises(BadInput, match="environment") as caught:
        parse_source(f"store:{text}")
    assert "SECRET" not in str(caught.value)
