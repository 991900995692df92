"""Dilated attention over a sequence that is sharded over the ranks of a process group."""
