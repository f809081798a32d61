"""Snapshots in a store: packed, unpacked and served as chunks that casync and desync read too.

A module imports only modules that stand before it here:

    compression                       a chunk and its zstd frame
    stores, object_stores, opening    a directory, an object store, which of them a text names
    snapshots                         index and sidecar of one snapshot
    packing, unpacking, comparing, collecting      the commands; program, __main__ their command line
    chunk_cache                       chunks on the disk of this host
    pace, peer_policy, peer_conversation, peers    chunks from other hosts, and how many are asked for at once
    chunk_reader, working_sets, store_source       a snapshot as a page source
"""
