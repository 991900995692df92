"""Attention over a sharded sequence: what a rank sends, computes and puts together."""
