"""``postcopy top --web``: who may look, and the screen in a real browser."""

from __future__ import annotations

import asyncio
import http.client
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.system.browser import Browser, link_of
from tests.system.service import Service, environment

DRAWN = 12_000  # bytes of a picture that has the table and the keys


@contextmanager
def top(directory: Path, address: str, **more: str) -> Iterator[str]:
    """The link that it prints."""
    words = [sys.executable, "-m", "postcopy", "top", "--web", address, "--runtime-dir", str(directory)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, env=environment(**more), text=True)
    try:
        assert process.stdout is not None
        yield link_of(process.stdout.readline())
        assert process.poll() is None
    finally:
        process.terminate()
        assert process.wait(30) == 0
        assert process.stdout is not None
        process.stdout.close()


def ask(link: str, path: str = "/", **headers: str) -> http.client.HTTPResponse:
    place = urlsplit(link)
    connection = http.client.HTTPConnection("127.0.0.1", place.port or 0, timeout=30)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer


TOKEN = {"POSTCOPY_WEB_TOKEN": "a" * 20}
COOKIE = {"Cookie": "postcopy-token=" + "a" * 20}


def test_on_the_loopback_no_other_site_may_ask(runtime_dir: Path) -> None:
    with Service(runtime_dir, "z=zero:64K"), top(runtime_dir, "127.0.0.1:0", **TOKEN) as link:
        assert link.startswith("http://127.0.0.1:")
        answer = ask(link, **COOKIE)
        assert answer.status == 200
        assert "default-src 'self'" in (answer.headers["Content-Security-Policy"] or "")
        for path in ("/", "/ws"):
            assert ask(link, path, Host="evil.example", **COOKIE).status == 403  # a name that was made to point here
            assert ask(link, path, Origin="http://evil.example", **COOKIE).status == 403


@pytest.mark.parametrize("address", ["127.0.0.1:0", "0.0.0.0:0"])
def test_a_token_is_needed(runtime_dir: Path, address: str) -> None:
    """Other users of this machine reach the loopback too."""
    with Service(runtime_dir, "z=zero:64K"), top(runtime_dir, address, **TOKEN) as link:
        assert link.endswith("/?token=" + "a" * 20)
        for path in ("/", "/ws", "/static/css/xterm.css", "/?token=" + "b" * 20):
            assert ask(link, path).status == 401
        answer = ask(link, "/?token=" + "a" * 20)
        cookie = answer.headers["Set-Cookie"] or ""
        assert (answer.status, answer.headers["Location"]) == (302, "/")
        assert "HttpOnly" in cookie and "SameSite=Strict" in cookie
        assert ask(link, "/", Cookie=cookie.partition(";")[0]).status == 200


def test_an_address_in_use_is_one_line(runtime_dir: Path) -> None:
    with Service(runtime_dir, "z=zero:64K"), top(runtime_dir, "127.0.0.1:0") as link:
        words = [sys.executable, "-m", "postcopy", "top", "--web", f"127.0.0.1:{urlsplit(link).port}"]
        done = subprocess.run(
            [*words, "--runtime-dir", str(runtime_dir)], capture_output=True, text=True, timeout=60, env=environment()
        )
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "in use" in done.stderr


def test_the_screen_in_a_browser(runtime_dir: Path) -> None:
    """It is drawn, keys reach it, and its process ends with it."""

    async def look(link: str) -> bytes:
        async with Browser() as browser:
            await browser.open(link)
            await browser.wait_for("document.body.classList.contains('-first-byte')", "the screen is drawn")
            await browser.wait_for("document.querySelector('.xterm canvas, .xterm-rows') !== null", "a terminal")
            await browser.evaluate("document.querySelector('.xterm-helper-textarea').focus()")
            picture = await browser.picture()
            while len(picture) < DRAWN:  # a grey page, or half of the screen
                await asyncio.sleep(0.2)
                picture = await browser.picture()
            await browser.press("q")
            await browser.wait_for("document.body.classList.contains('-closed')", "q leaves it")
            return picture

    with Service(runtime_dir, "ram0=zero:64K") as service, top(runtime_dir, "127.0.0.1:0") as link:
        service.client("ram0").do("b.buf[0]")
        picture = asyncio.run(look(link))
    assert picture.startswith(b"\x89PNG")
