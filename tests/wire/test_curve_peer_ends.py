"""A peer with a key whose connections end while its messages are received: libzmq must not abort (``!_more``, fq.cpp).

In a process of its own, because an abort cannot be caught."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import suppress

import zmq

from tests.system.service import environment

SECONDS = 40.0
ENDS = 30
ROUTER = """
import sys, time, zmq
from postcopy_wire.factory import open_router

endpoint, server_key, seconds, ends = sys.argv[1], sys.argv[2].encode(), float(sys.argv[3]), int(sys.argv[4])
got, connected = [0], [0]

def prepare(socket):
    socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
    socket.curve_serverkey = server_key

def on_connected():
    connected[0] += 1
    router.send(b"peer", b"here")

def on_frames(frames):
    got[0] += 1
    assert len(frames) == 300, len(frames)

router = open_router("native", lambda name, message: None)
router.connect(endpoint, b"peer", on_frames, on_connected, 1 << 20, prepare)
end = time.monotonic() + seconds
while connected[0] < ends and time.monotonic() < end:
    router.turn(0.05)
print(got[0], connected[0])
router.close()
"""


def test_connections_that_end_while_messages_come() -> None:
    public, secret = zmq.curve_keypair()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()

    def peer(endpoint: str) -> zmq.Socket[bytes]:
        made = context.socket(zmq.ROUTER)
        made.curve_server, made.linger = True, 0
        made.curve_publickey, made.curve_secretkey = public, secret
        try:
            made.bind(endpoint)
        except zmq.ZMQError:
            made.close(0)
            raise
        return made

    source = peer("tcp://127.0.0.1:*")
    bound = source.getsockopt(zmq.LAST_ENDPOINT)
    assert isinstance(bound, bytes)
    endpoint = bound.decode().removesuffix("\0")
    child = subprocess.Popen(
        [sys.executable, "-c", ROUTER, endpoint, public.decode(), str(SECONDS), str(ENDS)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    message = [b"x" * 20] * 300
    try:
        deadline = time.monotonic() + SECONDS + 20
        while child.poll() is None:
            assert time.monotonic() < deadline
            if not source.poll(100):
                continue
            name, _ = source.recv_multipart()
            with suppress(zmq.ZMQError):
                for _ in range(20):
                    source.send_multipart([name, *message], zmq.DONTWAIT)
            time.sleep(0.005)
            source.close(0)  # with messages on their way
            while child.poll() is None:
                with suppress(zmq.ZMQError):  # the port is free a moment later
                    source = peer(endpoint)
                    break
                time.sleep(0.001)
        said, errors = child.communicate()
        assert child.returncode == 0, errors
        got, connected = map(int, said.split())
        assert connected == ENDS, said
        assert got > ENDS, said
    finally:
        child.kill()
        child.wait()
        source.close(0)
        context.term()
