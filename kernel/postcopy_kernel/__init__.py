"""Linux for postcopy: userfaultfd, memory, descriptors, processes, sandbox. All ctypes calls are here."""
