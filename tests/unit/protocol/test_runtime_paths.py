"""The runtime directory and its names; errors that travel."""

from __future__ import annotations

import pickle

import pytest

from postcopy_protocol import errors, runtime_paths
from postcopy_protocol.errors import BadInput, PageLost, PostcopyError

EVERYTHING = {
    "POSTCOPY_RUNTIME_DIR": "/own",
    "RUNTIME_DIRECTORY": "/first:/second",
    "XDG_RUNTIME_DIR": "/session",
}


def test_the_order_of_the_rules() -> None:
    environ = dict(EVERYTHING)
    assert runtime_paths.runtime_directory("/said", environ) == "/said"
    assert runtime_paths.runtime_directory(None, environ) == "/own"
    environ["POSTCOPY_RUNTIME_DIR"] = ""
    assert runtime_paths.runtime_directory("", environ) == "/first"
    del environ["RUNTIME_DIRECTORY"]
    assert runtime_paths.runtime_directory(None, environ) == "/session/postcopy"
    assert runtime_paths.runtime_directory(None, {}) == "/run/postcopy"


def test_names() -> None:
    assert (runtime_paths.DOOR, runtime_paths.PRIVATE, runtime_paths.ROUTER, runtime_paths.LOCK) == (
        "door",
        "private",
        "private/router",
        "private/lock",
    )
    assert runtime_paths.door_path("/run/x") == "/run/x/door"
    assert runtime_paths.router_endpoint("/run/x") == "ipc:///run/x/private/router"
    assert runtime_paths.custodian_path("/run/x") == "/run/x/private/custodian"


def test_a_socket_path_may_have_107_bytes() -> None:
    room = 107 - len("/private/router")
    assert len(runtime_paths.router_endpoint("/" + "d" * (room - 1)).removeprefix("ipc://")) == 107
    for directory in ("/" + "d" * room, "/" + "ä" * (room // 2)):
        with pytest.raises(BadInput, match="too long"):
            runtime_paths.router_endpoint(directory)
    with pytest.raises(BadInput, match="too long"):
        runtime_paths.door_path("/" + "d" * 107)


@pytest.mark.parametrize(
    ("text", "users"), [("", set()), ("7", {7}), (" 7, 8,", {7, 8}), (",", set())], ids=["none", "one", "two", "comma"]
)
def test_users_that_are_trusted(text: str, users: set[int]) -> None:
    assert runtime_paths.trusted_users({"POSTCOPY_TRUST_UID": text}) == users
    assert runtime_paths.trusted_users({}) == set()


def test_users_that_cannot_be() -> None:
    for text in ("root", "-1", "7;8", "\u0663"):
        with pytest.raises(BadInput, match="POSTCOPY_TRUST_UID"):
            runtime_paths.trusted_users({"POSTCOPY_TRUST_UID": text})


def test_whose_attach_socket_is_trusted() -> None:
    """Each of the two owners, the listener's user and the file's, must be trusted."""
    for owners, trusted in (({7}, ()), ({0}, ()), ({0, 7}, ()), ({8, 0}, {8}), ({7, 8}, {8, 9})):
        runtime_paths.check_owners("/run/x", owners, 7, trusted)
    for owners, trusted in (({8}, ()), ({7, 8}, ()), ({0, 8}, {9})):
        with pytest.raises(errors.AttachDenied, match=r"/run/x is user 8's.*--trust-uid 8"):
            runtime_paths.check_owners("/run/x", owners, 7, trusted)


def test_errors_of_the_project_have_one_base() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert all(issubclass(kind, PostcopyError) for kind in kinds) and len(kinds) == 10


def test_a_lost_page_says_which_and_pickles() -> None:
    lost = PageLost(block="ram0", offset=4096)
    assert "ram0" in str(lost) and "4096" in str(lost)
    again = pickle.loads(pickle.dumps(PageLost("disk died", block="ram0", offset=8192)))
    assert (again.block, again.offset, again.reason, str(again)) == ("ram0", 8192, "disk died", "disk died")
    assert PageLost("no").offset == -1
