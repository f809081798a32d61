"""Conformance and load test of a vhost-user back-end's post-copy."""
