"""CURVE key files in the format of pyzmq's ``zmq.auth``. Text in, keys out: no file is opened.

::

    curve
        public-key = "40 characters of Z85"
        secret-key = "40 characters of Z85"      only in the secret file

A pair has two files: ``NAME.key`` is given to the peer, ``NAME.key_secret`` (0600) stays on its machine.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .errors import BadInput

PUBLIC_ENDING = ".key"
SECRET_ENDING = ".key_secret"

_ENTRY = re.compile(r"""^\s+(public-key|secret-key)\s*=\s*["']([^"']*)["']\s*$""", re.MULTILINE)
_KEY = re.compile(r"[0-9A-Za-z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}", re.ASCII)


@dataclass(frozen=True, slots=True)
class KeyPair:
    """Z85 text as bytes, 40 each. ``secret`` is empty if it was read from a public file."""

    public: bytes
    secret: bytes = b""

    def __repr__(self) -> str:
        """Without the secret, because this may be logged."""
        return f"KeyPair({self.public.decode()}{', secret' if self.secret else ''})"


def read_keys(text: str, where: str, *, secret: bool) -> KeyPair:
    """The keys of a file. ``where`` names it in errors. Raises BadInput if it has none, or lacks a required secret."""
    entries = dict(_ENTRY.findall(text)) if re.search(r"^curve\s*$", text, re.MULTILINE) else {}
    for name, key in entries.items():
        if not _KEY.fullmatch(key):
            raise BadInput(f"{where}: its {name} is no CURVE key")
    if "public-key" not in entries:
        raise BadInput(f"{where} has no CURVE key: make a pair with postcopy keygen")
    if secret and "secret-key" not in entries:
        raise BadInput(f"{where} has no secret key: name the file that ends in {SECRET_ENDING}")
    return KeyPair(entries["public-key"].encode(), entries.get("secret-key", "").encode() if secret else b"")


def write_keys(keys: KeyPair) -> str:
    """The text of the secret file, or of the public one for a pair without its secret."""
    head = "# A CURVE key of postcopy: " + (
        "SECRET, keep it on this machine" if keys.secret else "public, give it to the peer"
    )
    lines = [head, "metadata", "curve", f'    public-key = "{keys.public.decode()}"']
    if keys.secret:
        lines.append(f'    secret-key = "{keys.secret.decode()}"')
    return "\n".join(lines) + "\n"
