"""The ranks of a process group: what they compare, and how their messages travel.

The only room that knows torch.distributed.
"""
