"""``postcopy top --web HOST:PORT``: the same screen in a browser, by textual-serve.

Each browser window gets a process of its own, which runs ``postcopy top``. Any page that a browser has open may send
requests to this port, so a request with the name or origin of another site is refused. So may other users of this
machine, who may not ask the supervisor. So a token is needed: it is in the printed link, once, and in a cookie from
then on."""

from __future__ import annotations

import logging
import os
import secrets
import shlex
from typing import Any

from aiohttp import web
from textual_serve.server import Server

from postcopy_kernel.programs import command
from postcopy_kernel.tcp import TcpAddress

from ..errors import BadInput

MOST_WINDOWS = 8
"""At once: each is a process."""
TOKEN = "POSTCOPY_WEB_TOKEN"
"""Environment variable: the token, where it must be known before; at least 16 characters."""
_POLICY = "default-src 'self' 'unsafe-inline' data:; connect-src 'self' ws:; frame-ancestors 'none'"
"""Nothing from elsewhere: textual-serve's page asks for a font of a third party."""
_COOKIE = "postcopy-token"
_NAMES = ("localhost", "127.0.0.1", "[::1]")


class TopServer(Server):  # type: ignore[misc, unused-ignore]
    """Serves ``postcopy top`` with these arguments. Raises BadInput, if the address cannot be had."""

    def __init__(self, host: str, port: int, arguments: list[str]) -> None:
        words = command("postcopy", "top", *arguments)
        try:
            address = TcpAddress.of(host, port)
            self._socket = address.listen()
        except OSError as error:
            raise BadInput(f"--web {host}:{port}: {error.strerror or error}") from error
        self._port = self._socket.getsockname()[1]
        self._host = f"[{host}]" if ":" in host else host
        self._loopback = address.loopback
        self._token = _token()
        self._windows = 0
        super().__init__(shlex.join(words), host, self._port, title="postcopy top")

    @property
    def link(self) -> str:
        """What to open."""
        return f"http://{self._host}:{self._port}/?token={self._token}"

    def run(self) -> None:
        """Serve until Ctrl-C or SIGTERM."""
        logging.getLogger("textual_serve").setLevel(logging.WARNING)
        web.run_app(self._make_app(), sock=self._socket, print=None, access_log=None)

    async def on_startup(self, app: web.Application) -> None:
        print(f"postcopy top: {self.link}", flush=True)

    async def _make_app(self) -> web.Application:
        app = await super()._make_app()
        app.middlewares.append(self._check)
        return app

    @web.middleware
    async def _check(self, request: web.Request, handler: Any) -> web.StreamResponse:
        host, origin = request.host, request.headers.get("Origin")
        if self._loopback and host not in {f"{name}:{self._port}" for name in (*_NAMES, self._host)}:
            raise web.HTTPForbidden(text="this address has another name here\n")
        if origin is not None and origin != f"http://{host}":
            raise web.HTTPForbidden(text="another site may not ask here\n")
        if (refused := self._ask_token(request)) is not None:
            return refused
        if request.path != "/ws":
            answer: web.StreamResponse = await handler(request)
            answer.headers["Content-Security-Policy"] = _POLICY
            return answer
        if self._windows >= MOST_WINDOWS:
            raise web.HTTPServiceUnavailable(text=f"{MOST_WINDOWS} windows are open: close one\n")
        self._windows += 1
        try:
            return await handler(request)  # type: ignore[no-any-return]
        finally:
            self._windows -= 1

    def _ask_token(self, request: web.Request) -> web.Response | None:
        """None: it has the token. With the link it gets a cookie, and the token leaves the address bar."""
        if _same(request.cookies.get(_COOKIE, ""), self._token):
            return None
        if request.path != "/" or not _same(request.query.get("token", ""), self._token):
            raise web.HTTPUnauthorized(text="open the link that postcopy top has printed: it has a token\n")
        answer = web.HTTPFound("/")
        answer.set_cookie(_COOKIE, self._token, httponly=True, samesite="Strict")
        return answer

    async def handle_index(self, request: web.Request) -> web.StreamResponse:
        self.public_url = f"http://{request.host}"  # the name by which this browser knows us
        return await super().handle_index(request)


def _same(given: str, wanted: str) -> bool:
    return secrets.compare_digest(given.encode(), wanted.encode())


def _token() -> str:
    token = os.environ.get(TOKEN, "")
    if token and (len(token) < 16 or not token.isascii() or not token.isalnum()):
        raise BadInput(f"{TOKEN} has at least 16 letters and digits, and nothing else")
    return token or secrets.token_urlsafe(16)
