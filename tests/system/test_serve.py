"""Blocks of files as they are: exact sizes, every byte, the rest of the last page, several blocks, several clients."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import SourceFile
from tests.system.service import PAGE, Service, until, word

ODD = 3 * (1 << 20) + 4099


@pytest.mark.parametrize("mode", ["private", "shared"])
@pytest.mark.parametrize("size", [1, PAGE, PAGE + 1, ODD])
def test_every_byte_of_a_file_and_nothing_more(
    runtime_dir: Path, source_file: SourceFile, size: int, mode: str
) -> None:
    path = source_file(size)
    with Service(runtime_dir, f"ram0={path}") as service:
        client = service.client("ram0", mode)
        assert client.do("[b.size, len(b.buf), b.page_size, b.mode, b.name]") == [size, size, PAGE, mode, "ram0"]
        assert client.do(f"check(b, {str(path)!r})") == -1
        assert client.do("behind(b)") == ""
        block = service.block()
        assert (block["size"], block["pages"], block["kind"]) == (size, -(-size // PAGE), "local")
        service.await_received(block["pages"])


@pytest.mark.parametrize("order", ["forward", "random"])
@pytest.mark.parametrize("window", ["auto", "4K", "64K", "1M", "3M"])
def test_the_same_bytes_whatever_the_fault_around(
    runtime_dir: Path, source_file: SourceFile, window: str, order: str
) -> None:
    path = source_file(ODD)
    with Service(runtime_dir, f"ram0={path}", fault_around=window) as service:
        clients = [service.client("ram0", mode) for mode in ("private", "shared")]
        for seed, client in enumerate(clients):
            client.begin(f"check(b, {str(path)!r}, {order!r}, 4096, {seed})")
        assert [client.answer() for client in clients] == [-1, -1]
        pages = service.block()["pages"]
        service.await_received(pages)
        until(lambda: service.status()["totals"]["placed"] == pages, "every page is placed once, and counted")


@pytest.mark.parametrize(("window", "around"), [("4K", 0), ("auto", 600), ("64K", 700), ("1M", 700)])
def test_a_sequence_is_placed_around_its_faults(
    runtime_dir: Path, source_file: SourceFile, window: str, around: int
) -> None:
    path = source_file(ODD)
    with Service(runtime_dir, f"ram0={path}", fault_around=window) as service:
        assert service.client().do(f"check(b, {str(path)!r}, 'forward', 4096)") == -1
        until(lambda: service.status()["totals"]["placed"] == service.block()["pages"], "all are counted")
        found = service.status()["totals"]["placed_around"]
        assert found >= around and (around or not found)


def test_a_random_touch_brings_one_page(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(ODD)
    with Service(runtime_dir, f"ram0={path}") as service:
        client = service.client()
        pages = [700, 3, 401, 88, 260]
        assert client.do(f"words(b, {pages})") == [word(page * PAGE) for page in pages]
        service.await_received(len(pages))
        assert client.do("b.resident()") == pytest.approx(len(pages) / service.block()["pages"])


def test_several_blocks_in_several_clients(runtime_dir: Path, source_file: SourceFile) -> None:
    paths = [source_file(ODD + PAGE * number, number, f"{number}.bin") for number in range(3)]
    blocks = [f"ram{number}={path}" for number, path in enumerate(paths)]
    with Service(runtime_dir, *blocks, "holes=zero:100000") as service:
        clients = [service.client(None) for _ in range(2)]
        for client, mode in zip(clients, ("private", "shared"), strict=True):
            for number in range(3):
                client.attach(f"ram{number}", mode, f"b{number}")
            client.attach("holes", mode, "holes")
            checks = ", ".join(f"check(b{number}, {str(path)!r}, 'random')" for number, path in enumerate(paths))
            client.begin(f"[{checks}, any(holes.buf), len(holes.buf)]")
        assert [client.answer() for client in clients] == [[-1, -1, -1, False, 100000]] * 2
        records = [service.record(client) for client in clients]
        assert [len(record["blocks"]) for record in records] == [4, 4]


def test_private_writes_are_ones_own_and_shared_ones_are_everybodys(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(16 * PAGE)
    with Service(runtime_dir, f"ram0={path}") as service:
        one, two = service.client("ram0", "shared"), service.client("ram0", "shared")
        own, late = service.client("ram0", "private"), service.client("ram0", "private")
        own.do(f"write(b, {2 * PAGE}, 'aaaa')")
        one.do(f"write(b, {3 * PAGE}, 'bbbb')")
        assert own.do(f"read(b, {2 * PAGE}, 2)") == "aaaa"
        for client in (one, two, late):
            assert client.do("words(b, [2, 5])") == [word(2 * PAGE), word(5 * PAGE)]
        assert [client.do(f"read(b, {3 * PAGE}, 2)") for client in (one, two, own, late)] == ["bbbb"] * 4
    assert path.read_bytes()[: 4 * PAGE : PAGE] == bytes(4), "the file itself is never written"


def test_ensure_prefetch_resident(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(ODD)
    with Service(runtime_dir, f"ram0={path}", fault_around="4K") as service:
        client = service.client()
        client.do(f"b.ensure({10 * PAGE}, {20 * PAGE}, 10)")
        assert client.do(f"[b.resident({10 * PAGE}, {20 * PAGE}), b.resident(0, {10 * PAGE})]") == [1.0, 0.0]
        client.do("b.prefetch()")
        until(lambda: client.do("b.resident()") == 1.0, "the prefetch brings everything")
        assert client.do(f"check(b, {str(path)!r})") == -1


def test_close_and_attach_again(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(ODD)
    with Service(runtime_dir, f"ram0={path}", f"ram1={path}") as service:
        client = service.client()
        first = service.worker(client)
        client.attach("ram1", "shared", "c")
        client.do("b.close()")
        assert client.do(f"check(c, {str(path)!r})") == -1
        client.attach("ram0", "private", "b")
        assert client.do(f"check(b, {str(path)!r})") == -1
        client.do("b.close(); c.close()")
        until(lambda: not service.status()["clients"], "a client without blocks has left")
        assert first not in service.people()
        client.attach()
        assert client.do("words(b, [7])") == [word(7 * PAGE)]


def test_a_sparse_file_much_larger_than_memory(runtime_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    size = 100 << 30
    with path.open("wb") as file:
        file.truncate(size)
        for offset in (0, 50 << 30, size - PAGE):
            file.seek(offset)
            file.write(b"here")
    with Service(runtime_dir, f"ram0={path}") as service:
        for mode in ("private", "shared"):
            client = service.client("ram0", mode)
            assert client.do("b.size") == size
            found = client.do(f"[read(b, at, 4) for at in (0, {50 << 30}, {size - PAGE}, {size - 4}, {7 << 30})]")
            assert found == ["68657265"] * 3 + ["00000000"] * 2
            client.kill()  # or the end would poison 26 million pages of it
