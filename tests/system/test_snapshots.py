"""Snapshots with the real tools: what pack writes, casync and desync extract, from a directory and from S3."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.system.service import Service, environment, until
from tests.system.stores import KEY, SECRET, HttpStore, SeaweedFS, image, postcopy

CHUNK = 256 << 10


def tool(name: str) -> str:
    """A tool of Debian's, on the path or beside the interpreter."""
    beside = Path(sys.executable).with_name(name)
    found = shutil.which(name) or (str(beside) if beside.exists() else "")
    assert found, f"{name} is missing: scripts/install --test"
    return found


def run(*words: str | Path, **variables: str) -> str:
    done = subprocess.run(
        [str(word) for word in words], env=os.environ | variables, timeout=100, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("digest", ["sha256", "sha512-256"])
@pytest.mark.parametrize("chunk_size", ["256K", "12K"])
def test_casync_and_desync_extract_and_verify(tmp_path: Path, digest: str, chunk_size: str) -> None:
    path, store, out = tmp_path / "image", tmp_path / "store", tmp_path / "out"
    data = image(path, 300) + b"a tail that is no page"
    path.write_bytes(data)
    postcopy("pack", path, f"{store}/vm1", "--digest", digest, "--chunk-size", chunk_size)
    index, ours = store / "vm1.caibx", "sha256" if digest == "sha256" else "sha512-256"
    run(tool("desync"), "extract", "--digest", ours, "-s", store, index, out)
    assert out.read_bytes() == data
    run(tool("desync"), "verify-index", "--digest", ours, index, path)
    assert run(tool("desync"), "verify", "--digest", ours, "-s", store) == ""
    run(tool("casync"), "extract", f"--store={store}", index, tmp_path / "casync")
    assert (tmp_path / "casync").read_bytes() == data
    postcopy("unpack", f"{store}/vm1", tmp_path / "ours")
    assert (tmp_path / "ours").read_bytes() == data
    info = json.loads(postcopy("inspect", f"{store}/vm1", "--check", "--json"))
    assert (info["size"], info["digest"], info["missing"], info["damaged"]) == (len(data), digest, [], [])


def test_an_index_of_desync_is_ours_too(tmp_path: Path) -> None:
    """Its chunks begin anywhere, not at pages."""
    path, store = tmp_path / "image", tmp_path / "store"
    data = image(path, 500)
    store.mkdir()
    run(tool("desync"), "make", "-s", store, store / "theirs.caibx", path)
    postcopy("unpack", f"{store}/theirs", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == data
    assert json.loads(postcopy("inspect", f"{store}/theirs", "--check", "--json"))["sidecar"] is False


def test_the_second_snapshot_uploads_what_is_new(tmp_path: Path, s3: SeaweedFS) -> None:
    base = image(tmp_path / "one", 4096)
    # Pages that change lie near one another, as in a machine that works.
    other = bytearray(base)
    for start in range(0, 4096, 1024):
        for page in range(start, start + 51):
            other[page * 4096 : page * 4096 + 64] = os.urandom(64)
    (tmp_path / "two").write_bytes(other)
    first = json.loads(postcopy("pack", tmp_path / "one", "s3://snaps/up/one", "--json", variables=s3.variables))
    second = json.loads(postcopy("pack", tmp_path / "two", "s3://snaps/up/two", "--json", variables=s3.variables))
    assert first["new"] == first["unique"] and second["uploaded"] < 0.08 * first["uploaded"]
    again = json.loads(postcopy("pack", tmp_path / "two", "s3://snaps/up/two", "--json", variables=s3.variables))
    assert (again["new"], again["uploaded"]) == (0, 0) and again["identity"] == second["identity"]
    found = json.loads(
        postcopy("diff", "s3://snaps/up/one", "s3://snaps/up/two", "--json", status=1, variables=s3.variables)
    )
    assert found["changed_chunks"] == found["new_chunks"] == second["new"]
    for name, data in (("one", base), ("two", bytes(other))):
        postcopy("unpack", f"s3://snaps/up/{name}", tmp_path / "out", variables=s3.variables)
        assert (tmp_path / "out").read_bytes() == data
    host = s3.endpoint.replace("http://", "s3+http://")
    keys = {"S3_ACCESS_KEY": KEY, "S3_SECRET_KEY": SECRET, "S3_REGION": "us-east-1"}
    place = f"{host}/snaps/up"
    run(tool("desync"), "extract", "--digest", "sha256", "-s", place, f"{place}/two.caibx", tmp_path / "d", **keys)
    assert (tmp_path / "d").read_bytes() == other


def test_gc_keeps_what_is_named(tmp_path: Path, s3: SeaweedFS) -> None:
    for place, variables in ((str(tmp_path / "store"), {}), ("s3://snaps/gc", s3.variables)):
        for seed, name in enumerate(("one", "two")):
            image(tmp_path / name, 200, seed)
            postcopy("pack", tmp_path / name, f"{place}/{name}", variables=variables)
        if not variables:
            (tmp_path / "store" / "two.caibx").unlink()
        else:
            import obstore
            import obstore.store

            opened = obstore.store.S3Store(
                "snaps",
                endpoint=s3.endpoint,
                region="us-east-1",
                access_key_id=KEY,
                secret_access_key=SECRET,
                client_options={"allow_http": True},
            )
            obstore.delete(opened, "gc/two.caibx")
        would = json.loads(postcopy("gc", place, "--dry-run", "--json", variables=variables))
        done = json.loads(postcopy("gc", place, "--json", variables=variables))
        assert done["removed_chunks"] == would["removed_chunks"] > 0 and done["removed_others"] == 1
        assert json.loads(postcopy("gc", place, "--json", variables=variables))["removed_chunks"] == 0
        postcopy("inspect", f"{place}/one", "--check", variables=variables)


def test_a_killed_pack_leaves_no_image_and_is_continued(tmp_path: Path) -> None:
    path, store = tmp_path / "image", tmp_path / "store"
    data = image(path, 6000)
    words = [sys.executable, "-m", "postcopy", "pack", str(path), f"{store}/vm1", "--level", "19"]
    process = subprocess.Popen(words, env=environment())
    until(lambda: len(list(store.glob("????/*.cacnk"))) > 5, "some chunks are there", 60)
    process.send_signal(signal.SIGKILL)
    process.wait(20)
    assert not (store / "vm1.caibx").exists()
    there = len(list(store.glob("????/*.cacnk")))
    assert "is being packed" in postcopy("gc", store, status=1)
    done = json.loads(postcopy("pack", path, f"{store}/vm1", "--json"))
    assert 0 < done["new"] <= done["unique"] - there
    postcopy("gc", store)
    assert not [file for file in store.rglob("*") if "tmp" in file.name or "packing" in file.name]
    postcopy("unpack", f"{store}/vm1", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == data


def test_an_unpack_continues_what_was_interrupted(tmp_path: Path) -> None:
    path, store, out = tmp_path / "image", tmp_path / "store", tmp_path / "out"
    data = image(path, 1024)
    postcopy("pack", path, f"{store}/vm1")
    half = bytearray(data[: len(data) // 2])
    half[5000] ^= 1
    (tmp_path / "out.postcopy-partial").write_bytes(half)
    done = json.loads(postcopy("unpack", f"{store}/vm1", out, "--json"))
    assert done["resumed"] == len(data) // 2 - CHUNK and out.read_bytes() == data
    assert not (tmp_path / "out.postcopy-partial").exists()


def test_a_served_block_is_packed(runtime_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "image"
    data = image(path, 300)
    with Service(runtime_dir, f"ram0={path}"):
        postcopy("pack", "ram0", f"{tmp_path}/store/vm1", "--from", runtime_dir)
        assert "no supervisor" in postcopy("pack", "ram0", f"{tmp_path}/s/vm1", "--from", tmp_path, status=1)
    postcopy("unpack", f"{tmp_path}/store/vm1", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == data


def test_wrong_places_and_credentials(tmp_path: Path, s3: SeaweedFS) -> None:
    path = tmp_path / "image"
    image(path, 20)
    postcopy("pack", path, "s3://snaps/wrong/vm1", variables=s3.variables)
    inspect = ("inspect", "s3://snaps/wrong/vm1")
    wrong = s3.variables | {"AWS_SECRET_ACCESS_KEY": "another-secret"}
    assert "the secret key is wrong" in postcopy(*inspect, status=1, variables=wrong)
    wrong = s3.variables | {"AWS_ACCESS_KEY_ID": "another-key"}
    assert "access key is not known" in postcopy(*inspect, status=1, variables=wrong)
    assert "bucket does not exist" in postcopy("inspect", "s3://no-such-bucket/vm1", status=1, variables=s3.variables)
    assert "no snapshot vm2 in s3://snaps/wrong" in postcopy(
        "inspect", "s3://snaps/wrong/vm2", status=1, variables=s3.variables
    )
    wrong = s3.variables | {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    assert "no server listens there" in postcopy(*inspect, status=1, variables=wrong)
    shown = postcopy("inspect", f"s3://{KEY}:{SECRET}@snaps/vm1", status=2)
    assert "come from the environment" in shown
    assert "can only be read" in postcopy("pack", path, "http://127.0.0.1:9/vm1", status=1)
    assert "no-such-file" in postcopy("pack", tmp_path / "no-such-file", f"{tmp_path}/s/vm1", status=1)


def test_damage_is_named(tmp_path: Path) -> None:
    path, store = tmp_path / "image", tmp_path / "store"
    image(path, 1024)
    postcopy("pack", path, f"{store}/vm1")
    first, second, third = sorted(store.glob("????/*.cacnk"))[:3]
    first.unlink()
    second.write_bytes(second.read_bytes()[:-9])
    third.write_bytes(sorted(store.glob("????/*.cacnk"))[3].read_bytes())
    found = json.loads(postcopy("inspect", f"{store}/vm1", "--check", "--json", status=1))
    assert found["missing"] == [first.stem] and len(found["damaged"]) == 2
    text = postcopy("unpack", f"{store}/vm1", tmp_path / "out", status=1)
    assert "is missing in" in text or "is damaged" in text
    assert not (tmp_path / "out").exists()
    index = store / "vm1.caibx"
    whole = index.read_bytes()
    for wrong, why in ((whole[:-40], "its tail"), (b"x" + whole[1:], "no casync index"), (b"", "cut short")):
        index.write_bytes(wrong)
        assert why in postcopy("inspect", f"{store}/vm1", status=2)
    assert "cannot be used" in postcopy("gc", store, status=2)


def test_a_store_that_fails_is_asked_again_and_then_named(tmp_path: Path) -> None:
    image(tmp_path / "image", 20)
    postcopy("pack", tmp_path / "image", f"{tmp_path}/store/vm1")
    with HttpStore(tmp_path / "store") as store:
        postcopy("unpack", f"{store.url}/vm1", tmp_path / "out")
        store.what = 503
        assert "answers 503" in postcopy("inspect", f"{store.url}/vm1", status=1)
        assert store.asked["vm1.caibx"] > 2
