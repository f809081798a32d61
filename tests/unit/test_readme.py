"""The specification says what the code does: the table of messages, the examples, the limits, the refusals."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest

from postcopy_protocol import attach_conversation, codec, messages, received_map, return_path, runtime_paths
from postcopy_protocol.codec import MESSAGES, decode, encode, shape_of
from postcopy_protocol.messages import REFUSALS, REPORTS, VERSION, Message
from postcopy_protocol.return_path import FROM_SOURCE, FROM_SUPERVISOR, SOURCE_REFUSALS, pack_ranges
from postcopy_protocol.runtime_paths import SOCKET_PATH_BYTES

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
    table = {row[1]: [*row[:2], *row[3:]] for row in rows("## 8. All messages")}
    assert table == {kind.__name__: described(kind) for kind in MESSAGES.values()}


def test_what_a_client_may_send() -> None:
    sent = [row[1] for row in rows("## 8. All messages") if row[2] == "C > S"]
    assert sent == [kind.__name__ for kind in attach_conversation.FROM_CLIENT]


def test_the_order_is_that_of_the_rules() -> None:
    steps = [row for row in rows("### The order") if len(row) == 4]
    shown = {row[1].split("(")[0]: row[2].split("(")[0] for row in steps}
    rules = attach_conversation.RULES.items()
    assert shown == {
        kind.__name__: rule.answer.__name__ if rule.answer else "closes the connection" for kind, rule in rules
    }


def examples(fence: str) -> list[list[str]]:
    lines = README.split(f"```{fence}\n")[1].split("```")[0].splitlines()
    return [re.split(r"\s{2,}", line) for line in lines if line.strip()]


EXAMPLES = examples("examples")
RETURN_PATH = examples("return-path")
EVERY_EXAMPLE = EXAMPLES + RETURN_PATH
PACKED = re.compile(r"pack_ranges\((.*?\])\)")


@pytest.mark.parametrize(("shown", "bytes_"), EVERY_EXAMPLE, ids=[said.split("(")[0] for said, _ in EVERY_EXAMPLE])
def test_examples(shown: str, bytes_: str) -> None:
    name, _, arguments = shown[:-1].partition("(")
    kind: type[Message] = getattr(messages, name, None) or getattr(return_path, name)
    plain = PACKED.sub(lambda found: repr(pack_ranges(ast.literal_eval(found[1]))), arguments)
    message = kind(*ast.literal_eval(f"({plain},)" if plain else "()"))
    assert encode(message).hex(" ") == bytes_
    assert decode(bytes.fromhex(bytes_), expect=(kind,)) == message


def test_every_message_of_the_attach_socket_has_an_example() -> None:
    of_clients = {row[1] for row in rows("## 8. All messages") if "C" in row[2].split(" > ")}
    assert {said.split("(")[0] for said, _ in EXAMPLES} == of_clients


def test_every_message_of_the_return_path_has_an_example() -> None:
    table = {row[1]: row[2] for row in rows("## 8. All messages")}
    assert [name for name, way in table.items() if way == "S > P"] == [kind.__name__ for kind in FROM_SUPERVISOR]
    assert [name for name, way in table.items() if way == "P > S"] == [kind.__name__ for kind in FROM_SOURCE]
    shown = {said.split("(")[0] for said, _ in RETURN_PATH}
    assert shown == {kind.__name__ for kind in (*FROM_SUPERVISOR, *FROM_SOURCE)}


def test_refusals_and_reports() -> None:
    assert sorted(row[0] for row in rows("### Refusals")) == sorted(REFUSALS)
    assert tuple(row[0] for row in rows("### Refusals of a source")) == SOURCE_REFUSALS
    kinds = README.split("`kind` is one of")[1].split(".\n")[0]
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
        f"{attach_conversation.MAX_REGIONS} regions",
        f"at most {runtime_paths.MAX_NAME} characters",
        f"may have {SOCKET_PATH_BYTES} bytes",
        f"{received_map.MISSING} missing, {received_map.PLACING} being placed, {received_map.RECEIVED} received",
        f"{received_map.LOST} lost",
        f"none twice, 1 to {return_path.MAX_RANGES} of them, at most {return_path.MAX_RANGE_BYTES} bytes together",
        f"At most {return_path.MAX_OPEN_REQUESTS} requests and {return_path.MAX_OPEN_BYTES} bytes",
        f"`slots` (1 to {return_path.MAX_SLOTS}) slots",
        f"{return_path.MAX_STAGING_BYTES} bytes of slots at most",
        f"with the name `{return_path.STAGING_NAME}`",
        f"{return_path.STAGING_HEADER} bytes of header",
        f"begins with the {return_path.NONCE} bytes of `nonce`",
        f"one byte for each slot, {return_path.SLOT_FREE} free, {return_path.SLOT_FULL} full",
        f"{return_path.RangeKind.DATA} data, {return_path.RangeKind.ZERO} zero, {return_path.RangeKind.LOST} lost",
    ],
)
def test_limits(sentence: str) -> None:
    assert sentence in " ".join(README.split())


def test_lines_are_short_and_paragraphs_too() -> None:
    """Tables and the examples' bytes are as wide as they are."""
    prose = re.sub(r"```[a-z-]+\n.*?```", "", README, flags=re.DOTALL)
    prose = re.sub(r"^ *\|.*$", "", prose, flags=re.MULTILINE)
    assert [line for line in prose.splitlines() if len(line) > 100] == []
    paragraphs = re.split(r"\n\s*\n|\n\s*(?=\* |\d+\. )", prose)
    assert [text for text in paragraphs if len(text.split()) > 85] == []
