"""Fake calls (torch.compile, opcheck) of operators that take tables from the host.

FakeTensorMode refuses operators whose tensors lie on two devices before it asks their Meta kernel,
and `torch.library.register_fake` refuses operators that have one. Head offsets and the list of
sequences are numbers on the CPU beside tensors that may be on a GPU. So a fake call with such a
table is repeated with the table on their device: a fake tensor's device is only a label.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_impls import register_op_impl
from torch._subclasses.fake_tensor import FakeTensorMode

_dilated = torch.ops.dilated


@register_op_impl(  # type: ignore[untyped-decorator, unused-ignore]
    [
        _dilated.attention.default,
        _dilated.attention_backward.default,
        _dilated.attention_block.default,
        _dilated.attention_block_into.default,
        _dilated.attention_block_backward.default,
        _dilated.attention_block_backward_into.default,
        _dilated.gather.default,
        _dilated.gather_into.default,
        _dilated.scatter_add.default,
        _dilated.scatter_into.default,
        _dilated.ring_attention.default,
        _dilated.ring_attention_backward.default,
    ]
)
def _with_tables_on_device(mode: FakeTensorMode, func: Any, *args: Any, **kwargs: Any) -> Any:
    if (first := args[0]) is None:
        return NotImplemented
    given = ((name, kwargs.get(name)) for name in ("head_offsets", "sequences"))
    apart = {name: x for name, x in given if x is not None and x.device != first.device}
    if not apart:
        return NotImplemented
    for name, table in apart.items():
        if table.device.type != "cpu":
            raise ValueError(
                f"{name}: must be an int64 tensor on the CPU, got {table.dtype} on {table.device}"
            )
    with mode:
        moved = {name: table.to(first.device) for name, table in apart.items()}
        return func(*args, **{**kwargs, **moved})
