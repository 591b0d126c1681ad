"""Triplet sets on the disk: read, check, write, filter, assemble, publish (RORem, sec. 3.1)."""
