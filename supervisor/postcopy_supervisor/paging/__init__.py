"""A fault of a remote block: from the request of a worker to the wake."""
