"""The specification says what the code does: the table of messages, the examples, the limits, the refusals."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest

from postcopy_protocol import codec, door, messages, received
from postcopy_protocol.codec import MESSAGES, decode, encode, shape_of
from postcopy_protocol.messages import REFUSALS, REPORTS, VERSION, Message
from postcopy_protocol.places import SOCKET_PATH_BYTES

README = (Path(__file__).parents[2] / "protocol" / "README.md").read_text()
PLAIN = {bool: "bool", str: "str", bytes: "bin"}


def rows(chapter: str) -> list[list[str]]:
    """Cells of the tables in a chapter, without heads."""
    text = re.split(r"^#+ ", README.split(f"{chapter}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip(" `") for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def wire_type(kind: type[Message], name: str, hint: Any) -> str:
    if hint is int:
        shape = shape_of(kind)
        return "int" if dict(shape.integers)[shape.names.index(name)] < 0 else "uint"
    if get_origin(hint) is tuple:
        item = get_args(hint)[0]
        return f"[{PLAIN.get(item, item.__name__)}]"
    return PLAIN[hint]


def described(kind: type[Message]) -> list[str]:
    hints = get_type_hints(kind)
    fields = ", ".join(f"{name} {wire_type(kind, name, hints[name])}" for name in shape_of(kind).names)
    return [str(kind.TAG), kind.__name__, fields or "-", str(kind.DESCRIPTORS)]


def test_the_table_of_messages_is_complete_and_true() -> None:
    table = {row[1]: [*row[:2], *row[3:]] for row in rows("## 7. All messages")}
    assert table == {kind.__name__: described(kind) for kind in MESSAGES.values()}


def test_who_speaks_at_the_door() -> None:
    heard = [row[1] for row in rows("## 7. All messages") if row[2] == "C > S"]
    assert heard == [kind.__name__ for kind in door.FROM_CLIENT]


EXAMPLES = [
    re.split(r"\s{2,}", line) for line in README.split("```examples\n")[1].split("```")[0].splitlines() if line.strip()
]


@pytest.mark.parametrize(("said", "bytes_"), EXAMPLES, ids=[said.split("(")[0] for said, _ in EXAMPLES])
def test_examples(said: str, bytes_: str) -> None:
    name, _, arguments = said.partition("(")
    kind: type[Message] = getattr(messages, name)
    message = kind(*ast.literal_eval(f"({arguments.rstrip(')')},)" if arguments != ")" else "()"))
    assert encode(message).hex(" ") == bytes_
    assert decode(bytes.fromhex(bytes_), expect=(kind,)) == message


def test_every_message_of_the_door_has_an_example() -> None:
    at_the_door = {row[1] for row in rows("## 7. All messages") if "C" in row[2].split(" > ")}
    assert {said.split("(")[0] for said, _ in EXAMPLES} == at_the_door


def test_refusals_and_reports() -> None:
    assert sorted(row[0] for row in rows("### Refusals")) == sorted(REFUSALS)
    kinds = README.split("`kind` is one of ")[1].split(".\n")[0]
    assert tuple(re.findall(r"`([a-z-]+)`", kinds)) == REPORTS


@pytest.mark.parametrize(
    "sentence",
    [
        f"Version **{VERSION}** of the protocol",
        f"`version` is {VERSION}.",
        f"valid UTF-8, at most {codec.MAX_TEXT} bytes",
        f"bin 32 | at most {codec.MAX_BYTES} bytes",
        f"at most {codec.MAX_ITEMS} items",
        f"at most {codec.MAX_OFFSETS} of them",
        f"{door.MAX_REGIONS} regions",
        f"at most {door.MAX_NAME} characters",
        f"may have {SOCKET_PATH_BYTES} bytes",
        f"{received.MISSING} missing, {received.PLACING} being placed, {received.RECEIVED} received",
        f"{received.LOST} lost",
    ],
)
def test_limits(sentence: str) -> None:
    assert sentence in README
