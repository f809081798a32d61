"""ZeroMQ's wire on sockets of our own, where a fault passes: a worker's channel, and the router at the other end.

What the bytes mean is law and stands in the protocol wing (``zmtp.py``); here they are sent and received.
"""
