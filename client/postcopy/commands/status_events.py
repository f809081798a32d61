"""``postcopy status --events`` and ``--story``: what happened and why, as text and as JSON."""

from __future__ import annotations

import json
import time
from typing import Any

from postcopy_protocol.sizes import format_size

from ..queries import Control

_EVERY = 0.5
_SHOWN_APART = ("number", "at", "kind", "detail")


def show_events(runtime_dir: str | None, *, as_json: bool, follow: bool) -> None:
    """The events, oldest first. ``follow`` continues until Ctrl-C; as JSON it prints one event per line."""
    with Control(runtime_dir) as control:
        events = control.events()
        if as_json and not follow:
            print(json.dumps({"events": events}))
            return
        last = 0
        while True:
            for event in events:
                last = max(last, int(event.get("number", 0)))
                print(json.dumps(event) if as_json else _event_line(event), flush=follow)
            if not follow:
                return
            time.sleep(_EVERY)
            events = control.events(last)


def _event_line(event: dict[str, Any]) -> str:
    fields = " ".join(f"{key}={json.dumps(event[key])}" for key in event if key not in _SHOWN_APART)
    return f"{_clock(event['at'])} {event['kind']}: {event['detail']}" + (f"  [{fields}]" if fields else "")


def _clock(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at)) + f".{int(at % 1 * 1000):03d}"


def show_story(runtime_dir: str | None, name: str, offset: int, *, as_json: bool) -> None:
    """The history of one page."""
    with Control(runtime_dir) as control:
        story = control.story(name, offset)
    print(json.dumps(story) if as_json else "\n".join(_story_lines(story)))


def _story_lines(story: dict[str, Any]) -> list[str]:
    where = f"{story['block']}+{story['offset']:#x}: page {story['page']} of {format_size(story['page_size'])}"
    state = story.get("source_state")
    present = {True: "present", False: "absent", None: "not asked for huge pages"}[story["present"]]
    lines = [
        f"{where}, {story['kind']}, from {story['source']}" + (f" ({state})" if state else ""),
        f"received map: {story['state']}; page cache: {present}" + ("; POLLUTED" if story["polluted"] else ""),
    ]
    if story["told_lost"]:
        lines.append("it was reported as lost to a client; it is requested again when its source is back")
    waiting = ", ".join("the supervisor itself" if one == 0 else f"client {one}" for one in story["waiting"])
    lines.append(f"waiting now: {waiting or 'no client'}")
    if story["request"] is not None:
        lines.append(f"requested: {_request(story['request'])}")
    lines += [_client(client) for client in story["clients"]]
    lines += [f"{_clock(one['at'])} {one['kind']}: {one['detail']}{_outcome(one)}" for one in story["life"]]
    return [*lines, f"not recorded: {story['not_recorded']}"]


def _request(request: dict[str, Any]) -> str:
    who = "the background" if request["client"] is None else f"client {request['client']}"
    sent = f"sent {_clock(request['at'])}" if request["state"] == "sent" else "waits to be sent"
    size = f"{format_size(request['length'])} from offset {request['offset']}"
    return f"{size}, first requested by {who}, {sent}, attempt {request['attempts']}"


def _client(client: dict[str, Any]) -> str:
    said = [client["state"]] + [word for word in ("released", "denied") if client[word]]
    return f"mapped by client {client['id']} ({client['name']}), {'+'.join(client['modes'])}: {', '.join(said)}"


def _outcome(one: dict[str, Any]) -> str:
    if one["kind"] != "asked":
        return f" ({one['cause']})" if "cause" in one and one["cause"] not in one["detail"] else ""
    size = f", {format_size(one['length'])} from offset {one['offset']}"
    return size + (f", answered after {one['took_ms']:g} ms" if "took_ms" in one else ", not answered")
