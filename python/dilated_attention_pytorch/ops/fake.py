"""Fake calls (torch.compile, opcheck) of operators that take a table from the host.

FakeTensorMode refuses operators whose tensors lie on two devices before it asks their Meta kernel,
and `torch.library.register_fake` refuses operators that have one. The table of head offsets is a
few numbers on the CPU beside tensors that may be on a GPU. So a fake call with such a table is
repeated with the table on their device: a fake tensor's device is only a label.
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
def _with_table_on_device(mode: FakeTensorMode, func: Any, *args: Any, **kwargs: Any) -> Any:
    table, first = kwargs.get("head_offsets"), args[0]
    if table is None or first is None or table.device == first.device:
        return NotImplemented
    if table.device.type != "cpu":
        raise ValueError(
            f"head_offsets: must be an int64 tensor on the CPU, got {table.dtype} on {table.device}"
        )
    with mode:
        return func(*args, **{**kwargs, "head_offsets": table.to(first.device)})
