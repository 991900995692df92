"""Where tensors are not what they seem.

torch.func's transforms wrap every tensor that is made within them; what a tracer records as a
number is another one later.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.compiler import is_compiling


def in_transform() -> bool:
    """Whether a call is differentiated or mapped by torch.func; False while a compiler traces."""
    return not is_compiling() and torch._C._are_functorch_transforms_active()


def is_traced() -> bool:
    """Whether a compiler or torch.jit records a call, to repeat it for other tensors."""
    return is_compiling() or torch._C._get_tracing_state() is not None


def outside_transforms() -> AbstractContextManager[object]:
    """For tables of numbers, which are no part of what is transformed and may be kept."""
    return temporarily_clear_interpreter_stack() if in_transform() else nullcontext()
