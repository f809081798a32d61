"""Page sources at the other end of a return path."""
