"""What we say to Linux: userfaultfd, memory, descriptors, processes. Every ctypes call of the project stands here."""
