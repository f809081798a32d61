"""ZeroMQ transports: native sockets and libzmq behind one interface (``transport.py``).

The bytes on the wire are ZMTP (``postcopy_protocol.zmtp``), so the two ends of a connection may use different
transports.
"""
