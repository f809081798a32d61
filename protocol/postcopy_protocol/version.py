"""Version of the package, for programs of every wing. The protocol's own is ``messages.VERSION``."""

PACKAGE = "0.1.0"
