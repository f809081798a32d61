"""What we say to each other: messages, codec, geometry and the laws of the conversations. Pure: no socket, syscall or clock."""
