"""Servers that several test files use."""

from tests.system.stores import s3

__all__ = ["s3"]
