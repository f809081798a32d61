"""What the programs of postcopy send to one another. Pure: no socket, no system call, no clock, no other wing.

``messages`` and ``return_path`` define the messages, ``codec`` their bytes. ``attach_conversation``,
``source_conversation`` and ``vhost_conversation`` are the state machines. ``geometry``, ``received_map``, ``counters``,
``stages``, ``trace`` and ``window`` describe what several programs share in memory. ``runtime_paths``, ``sizes`` and
``sources`` parse what a user types. ``protocol/README.md`` is the specification.
"""
