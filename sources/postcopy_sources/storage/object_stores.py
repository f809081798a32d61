"""A store behind a URL, by obstore: S3 and what speaks it, Google's, Azure's, and plain HTTP to read.

obstore finds credentials in the environment and from the machine's metadata service. Its error texts hold URLs and what
the server said, so they are never shown: a cause is made of their kind and of the server's error code."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

from postcopy_protocol.errors import PostcopyError
from postcopy_protocol.sources import READ_ONLY_SCHEMES

from .stores import Entry, Missing, OnAnswer, Refused, Store, StoreFailed, ignore

CONNECT_SECONDS = 3.0
RETRIES = 3
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_CODE = re.compile(r"<Code>([A-Za-z0-9]{1,64})</Code>")
_STATUS = re.compile(r"status code: ([0-9]{3})")

_CREDENTIALS = {
    "InvalidAccessKeyId": "the access key is not known there",
    "SignatureDoesNotMatch": "the secret key is wrong",
    "ExpiredToken": "the session token has expired",
    "InvalidToken": "the session token is wrong",
    "AccessDenied": "the credentials do not allow it",
    "RequestTimeTooSkewed": "the clock of this machine is wrong",
}
_BUCKET = {
    "NoSuchBucket": "the bucket does not exist",
    "InvalidBucketName": "the bucket cannot have this name",
    "PermanentRedirect": "the bucket is in another region (AWS_REGION)",
    "AuthorizationHeaderMalformed": "the bucket is in another region (AWS_REGION)",
}

Result = TypeVar("Result")


def open_object_store(url: str, patience: float) -> Store:
    """The store at ``url``, which was checked. Nothing is asked of it yet. A request may take ``patience`` seconds.
    Raises PostcopyError."""
    try:
        import obstore.exceptions
        import obstore.store
    except ImportError:
        raise PostcopyError(f"{url} needs obstore, which is not installed: pip install 'postcopy[store]'") from None
    plain = url.startswith("http://") or any(os.environ.get(name, "").startswith("http://") for name in _ENDPOINTS)
    options: dict[str, Any] = {
        "client_options": {
            "timeout": timedelta(seconds=patience),
            "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
            **({"allow_http": True} if plain else {}),
        },
        "retry_config": {
            "max_retries": RETRIES,
            "retry_timeout": timedelta(seconds=1.2 * patience),
            "backoff": {
                "init_backoff": timedelta(seconds=0.1),
                "max_backoff": timedelta(seconds=2),
                "base": 2,
            },
        },
    }
    try:
        opened = obstore.store.from_url(url, **options)
    except (obstore.exceptions.BaseError, ValueError) as error:
        kind = type(error).__name__
        raise PostcopyError(
            f"{url} cannot be opened ({kind}): check the URL and the settings in the environment"
        ) from None
    return ObjectStore(url, opened)


class ObjectStore:
    """See Store. ``opened``: obstore's."""

    def __init__(self, url: str, opened: Any) -> None:
        import obstore
        import obstore.exceptions

        self.shown = url
        self.writable = not url.startswith(tuple(f"{scheme}://" for scheme in READ_ONLY_SCHEMES))
        self._opened, self._api, self._errors = opened, obstore, obstore.exceptions

    def get(self, key: str, limit: int, on_answer: OnAnswer = ignore) -> bytes:
        def get() -> bytes:
            found = self._api.get(self._opened, key)
            on_answer()
            size = found.meta["size"]
            if size > limit:
                raise StoreFailed(f"{self.shown}: {key} has {size} bytes, more than {limit}")
            return bytes(found.bytes())

        return self._do("read", key, get)

    def put(self, key: str, data: bytes, *, replace: bool = False) -> bool:
        def put() -> bool:
            attributes = {"Content-Type": "application/zstd"} if key.endswith(".cacnk") else None
            try:
                self._api.put(
                    self._opened,
                    key,
                    data,
                    mode="overwrite" if replace else "create",
                    attributes=attributes,
                    use_multipart=None if replace else False,
                )
            except self._errors.AlreadyExistsError:  # perhaps our own first try
                return False
            return True

        return self._do("write", key, put)

    def has(self, key: str) -> bool:
        def has() -> bool:
            try:
                return bool(self._api.head(self._opened, key)["size"])
            except (FileNotFoundError, self._errors.PermissionDeniedError):  # the latter: without the right to list
                return False

        return self._do("read", key, has)

    def list(self) -> Iterator[Entry]:
        found = self._do("list", "", lambda: self._api.list_with_delimiter(self._opened))
        return (Entry(one["path"], one["size"]) for one in found["objects"])

    def walk(self) -> Iterator[Entry]:
        pages = self._do("list", "", lambda: self._api.list(self._opened, chunk_size=1000))
        while page := self._do("list", "", lambda: next(pages, None)):
            yield from (Entry(one["path"], one["size"]) for one in page)

    def delete(self, keys: Iterable[str]) -> None:
        wanted = list(keys)

        def delete() -> None:
            try:
                self._api.delete(self._opened, wanted)
            except FileNotFoundError:
                if len(wanted) > 1:
                    for key in wanted:
                        self.delete([key])

        if wanted:
            self._do("delete", wanted[0], delete)

    def settle(self) -> None:
        """A store that has confirmed an object keeps it."""

    def _do(self, what: str, key: str, call: Callable[[], Result]) -> Result:
        """Raises StoreFailed for what obstore raises."""
        try:
            return call()
        except PostcopyError:
            raise
        except (self._errors.BaseError, OSError, ValueError) as error:
            raise self._failed(what, key, error) from None

    def _failed(self, what: str, key: str, error: Exception) -> StoreFailed:
        text = str(error)
        found = _CODE.search(text)
        code = found.group(1) if found else ""
        where = f"{self.shown}: cannot {what} {key or 'it'}"
        if code in _BUCKET:
            return Refused(f"{where}: {_BUCKET[code]}")
        if isinstance(error, FileNotFoundError):
            return Missing(f"{where}: it is not there")
        if code in _CREDENTIALS:
            return Refused(f"{where}: {_CREDENTIALS[code]}")
        if isinstance(error, (self._errors.PermissionDeniedError, self._errors.UnauthenticatedError)):
            return Refused(f"{where}: the credentials are refused")
        if "169.254.169.254" in text or "metadata.google" in text:
            return Refused(f"{where}: there are no credentials: set them in the environment (AWS_ACCESS_KEY_ID ...)")
        if isinstance(error, self._errors.NotSupportedError):
            return Refused(f"{where}: the store cannot do that")
        status = _STATUS.search(text)
        if status:
            return StoreFailed(f"{where}: the store answers {status.group(1)}{f' ({code})' if code else ''}")
        for sign, cause in _CAUSES.items():
            if sign in text:
                return StoreFailed(f"{where}: {cause}")
        return StoreFailed(f"{where}: the store does not answer as it should")


_CAUSES = {
    "dns error": "its host name is not known",
    "ConnectionRefused": "no server listens there",
    "certificate": "its certificate is not trusted",
    "TimedOut": "it does not answer in time",
    "kind: Timeout": "it does not answer in time",
    "kind: Connect": "it cannot be reached",
    "kind: Interrupted": "the connection was lost",
    "kind: Body": "the connection was lost",
}
"""What obstore's description of an error holds, and the cause that it stands for."""
