"""What the programs of the house say to each other. Pure: no socket, no system call, no clock, no other wing.

``messages`` holds the words and ``codec`` their bytes; ``door`` is the law of the conversation with a client;
``geometry``, ``received``, ``window`` and ``statistics`` are the shapes that several programs share in memory;
``places``, ``sizes`` and ``sources`` are what a person types. ``protocol/README.md`` is the specification.
"""
