"""Which rows travel where, as data. Pure functions, the same on all ranks, without processes."""
