"""Errors say the argument, what must hold and what was given, in this order, and a range alike."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dilated_attention_pytorch import (
    MultiheadDilatedAttention,
    dilated_attention,
    suggest_branches,
)
from dilated_attention_pytorch.pattern import Pattern, PatternSpec, make_branches
from dilated_attention_pytorch.pattern.bounds import at_least
from dilated_attention_pytorch.plot import plot_pattern

ROOT = Path(__file__).resolve().parent.parent
SHAPE = re.compile(r"\S.* must .*[,;] got ", re.DOTALL)
THROWN = re.compile(r"(?:TORCH_CHECK(?:_VALUE)?|std::invalid_argument|\brequire)\(")


def python_messages(source: str) -> Iterator[str]:
    """What a raise of TypeError or ValueError says, fields as {}."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call):
            continue
        if ast.unparse(node.exc.func) in ("TypeError", "ValueError") and node.exc.args:
            yield text_of(node.exc.args[0])


def text_of(node: ast.expr) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(value) for value in node.values)
    if isinstance(node, ast.Constant):
        return str(node.value)
    return "{}"


def cpp_messages(source: str) -> Iterator[str]:
    """The literals of a check's message, with {} between them."""
    for match in THROWN.finditer(source):
        depth, end = 1, match.end()
        while depth:
            depth += {"(": 1, ")": -1}.get(source[end], 0)
            end += 1
        literals = re.findall(r'"((?:[^"\\]|\\.)*)"', source[match.end() : end])
        if literals:
            yield "{}" + "{}".join(literals)


def every_message() -> Iterator[tuple[str, str]]:
    for folder, ending, messages in (
        ("python", "py", python_messages),
        ("examples", "py", python_messages),
        ("benchmarks", "py", python_messages),
        ("csrc", "cpp", cpp_messages),
    ):
        for path in sorted((ROOT / folder).rglob(f"*.{ending}")):
            for message in messages(path.read_text()):
                yield path.relative_to(ROOT).as_posix(), message


def test_messages_say_argument_rule_value() -> None:
    found = list(every_message())
    assert len({path for path, _ in found}) > 30
    assert [(path, said) for path, said in found if not SHAPE.match(said)] == []


@pytest.mark.parametrize("said", ["got 3 heads", "heads: at most 3, got 4", "got 4, must be 3"])
def test_a_message_in_another_order_is_found(said: str) -> None:
    (python,) = python_messages(f'raise ValueError(f"{said} {{x}}")')
    (cpp,) = cpp_messages(f'TORCH_CHECK_VALUE(f(x), "{said} ", x);')
    assert not SHAPE.match(python) and not SHAPE.match(cpp)


def spec(**changes: int) -> PatternSpec:
    sizes = {"heads": 4, "kv_heads": 4} | changes
    return PatternSpec(
        **{"seq_len": 8, **sizes}, branches=make_branches([4], [1]), head_offsets="blocked"
    )


def test_ranges_of_lengths_and_heads_are_worded_alike() -> None:
    one, long, many = torch.zeros(1), 2**31 - 1, 2**16
    x, wide = one.expand(1, long, 1, 8), one.expand(1, 8, many, 8)
    lengths = [
        lambda: Pattern.plan(spec(seq_len=long)),
        lambda: suggest_branches(long),
        lambda: dilated_attention(x, x, x, [4], [1]),
        lambda: torch.ops.dilated.attention(x, x, x, [4], [1]),
        lambda: torch.ops.dilated.attention_block(x, x, x, long, 0, 0, [4], [1]),
    ]
    heads = [
        lambda: Pattern.plan(spec(heads=many, kv_heads=many)),
        lambda: dilated_attention(wide, wide, wide, [4], [1]),
        lambda: torch.ops.dilated.attention(wide, wide, wide, [4], [1]),
        lambda: MultiheadDilatedAttention(many, many, [4], [1]),
    ]
    for calls, name, rule, value in (
        (lengths, "seq_len", r"at least [01] and below 2\^31 - 1", long),
        (heads, "heads", r"at least 1 and below 2\^16", many),
    ):
        for call in calls:
            with pytest.raises(ValueError, match=rf"{name}:? must be {rule}, got {value}"):
                call()


def test_pictures_word_ranges_so_too() -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match=r"seq_len must be at least 1 and below 2\^31 - 1, got"):
        plot_pattern(2**31 - 1, [4], [1])
    with pytest.raises(ValueError, match=r"heads must be at least 1 and below 2\^16, got 65536"):
        plot_pattern(8, [4], [1], heads=2**16)


def test_bounds_of_no_power_are_plain() -> None:
    assert at_least(0, True + 1, "x", 3) == 2
    with pytest.raises(ValueError, match="^x must be at least 0 and below 3, got 3$"):
        at_least(0, 3, "x", 3)
    with pytest.raises(ValueError, match="^x must be at least 1, got 0$"):
        at_least(1, 0, "x")
