"""The supervisor: owns RAM blocks, the core userfaultfd and the quit eventfd, answers clients on the attach socket,
runs the worker pool, and moves pages of remote blocks from their sources."""
