"""Firecracker: page-fault handling for its snapshots, and the API call that restores one."""
