"""`group` as functions, modules and factories take it."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dilated_attention_pytorch import (
    DilatedAttention,
    MultiheadDilatedAttention,
    PatternCache,
    RingDilatedAttentionV2,
    create_dilated_attention,
    create_multihead_dilated_attention,
    dilated_attention,
)
from dilated_attention_pytorch.pattern import advice
from dilated_attention_pytorch.ring import shard
from tests.conftest import make_qkv
from tests.ring.processes import Processes, group_of

BRANCHES = ([16, 40], [1, 2])
SHARDS = [30, 10, 23]


def expect(error: type[Exception], text: str, function: Callable[[], object]) -> None:
    with pytest.raises(error, match=text):
        function()


def every_form(size: int) -> None:
    """Groups, meshes and names; functions, modules and factories."""
    group = group_of(size)
    rank = group.rank()
    begin = sum(SHARDS[:rank])
    whole = make_qkv(sum(SHARDS), 4, 8)
    mine = [x[:, begin : begin + SHARDS[rank]] for x in whole]
    expected = dilated_attention(*whole, *BRANCHES, head_offsets="blocked", is_causal=True)
    expected = expected[:, begin : begin + SHARDS[rank]]
    mesh = DeviceMesh.from_group(group, "cpu")
    options: dict[str, Any] = {"shard_lengths": SHARDS, "head_offsets": "blocked"}
    for form in (group, mesh, group.group_name):
        out = dilated_attention(*mine, *BRANCHES, is_causal=True, group=form, **options)
        torch.testing.assert_close(out, expected)
        modules = [
            DilatedAttention(*BRANCHES, group=form, **options),
            RingDilatedAttentionV2(*BRANCHES, ring_size=size, group=form, **options),
            create_dilated_attention(
                "ring",
                segment_lengths=BRANCHES[0],
                dilation_rates=BRANCHES[1],
                group=form,
                strategy="ring",
                **options,
            ),
        ]
        modules += [copy.deepcopy(modules[0]), pickle.loads(pickle.dumps(modules[1]))]
        for module in modules:
            torch.testing.assert_close(module(*mine, is_causal=True), expected)
            assert f"group={group.group_name!r}, shard_lengths=[30, 10, 23]" in repr(module)
        assert modules[1].ring_size == size


def test_every_form_of_group_and_of_call(workers: Processes) -> None:
    workers.run(3, every_form)


def multihead(size: int) -> None:
    group = group_of(size)
    rank = group.rank()
    torch.manual_seed(0)
    alone = MultiheadDilatedAttention(32, 4, *BRANCHES)
    x = torch.randn(2, 40, 32)
    mine = x[:, rank * 20 : (rank + 1) * 20]
    expected = alone(x, is_causal=True)[0]
    expected.square().sum().backward()
    for make in (
        lambda: MultiheadDilatedAttention(32, 4, *BRANCHES, group=group),
        lambda: create_multihead_dilated_attention(
            "auto", 32, 4, *BRANCHES, group=group, ring_size=2
        ),
    ):
        module = make()
        module.load_state_dict(alone.state_dict())
        out = module(mine, is_causal=True)[0]
        torch.testing.assert_close(out, expected[:, rank * 20 : (rank + 1) * 20])
        out.square().sum().backward()
        for ours, theirs in zip(module.parameters(), alone.parameters(), strict=True):
            dist.all_reduce(ours.grad, group=group)
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)


def test_multihead_modules(workers: Processes) -> None:
    workers.run(2, multihead)


def refuse(size: int) -> None:
    group = group_of(size)
    q = make_qkv(20, 4, 8)[0]

    def attend(**options: Any) -> Callable[[], object]:
        return lambda: dilated_attention(q, q, q, *BRANCHES, **options)

    expect(TypeError, "group must be a ProcessGroup.*got 3", attend(group=3))
    expect(RuntimeError, "got the name 'nobody', which is none", attend(group="nobody"))
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()))
    expect(ValueError, "DeviceMesh of one dimension.*got 2", attend(group=mesh))
    expect(
        ValueError,
        "one length for each of the group's 2 ranks",
        attend(group=group, shard_lengths=[20]),
    )
    expect(ValueError, "at least 0", attend(group=group, shard_lengths=[25, -5]))
    expect(TypeError, "shard_lengths must be integers", attend(group=group, shard_lengths=[1.5, 2]))
    expect(ValueError, "strategy must be one of", attend(group=group, strategy="rign"))
    cache = PatternCache()
    for bad in (cache, False):
        text = "pattern_cache must be None where a group is given"
        expect(ValueError, text, attend(group=group, pattern_cache=bad))
        module = partial(DilatedAttention, *BRANCHES, group=group, pattern_cache=bad)
        expect(ValueError, text, module)
    expect(
        ValueError,
        "ring_size must be None or the group's size, 2, got 3",
        lambda: RingDilatedAttentionV2(*BRANCHES, ring_size=3, group=group),
    )


def test_wrong_groups_and_shards_are_refused(workers: Processes) -> None:
    # A mesh is made by all ranks of the world.
    workers.start(refuse, 2, ranks=range(2))
    workers.start(only_mesh, ranks=range(2, 4))
    for rank in range(4):
        workers.result(rank)


def only_mesh() -> None:
    init_device_mesh("cpu", (1, dist.get_world_size()))


def test_what_a_group_needs_is_refused_without_one() -> None:
    q = make_qkv(20, 4, 8)[0]
    with pytest.raises(ValueError, match=r"shard_lengths must be None where no group.*\[20\]"):
        dilated_attention(q, q, q, *BRANCHES, shard_lengths=[20])
    with pytest.raises(ValueError, match="strategy must be 'auto' where no group.*'ring'"):
        DilatedAttention(*BRANCHES, strategy="ring")
    with pytest.raises(ValueError, match="strategy must be one of .*'rign'"):
        dilated_attention(q, q, q, *BRANCHES, strategy="rign")


def outlive_the_group(size: int) -> None:
    q = make_qkv(20, 4, 8)[0]
    group = dist.new_group(list(range(size)))
    dist.barrier(group)  # a rank that leaves while another one connects makes that one fail
    name = group.group_name
    module = DilatedAttention(*BRANCHES, group=group)
    data = pickle.dumps(module)
    dist.destroy_process_group(group)
    for some in (module, copy.deepcopy(module), pickle.loads(data)):
        expect(RuntimeError, f"got the name '{name}', which is none", partial(some, q, q, q))


def test_a_module_needs_a_group_of_its_name(workers: Processes) -> None:
    workers.run(4, outlive_the_group)


PROFILED = """
import gc, pathlib, sys
import torch
import torch.distributed as dist
from dilated_attention_pytorch import dilated_attention

def gloo_threads():
    names = (task.read_text().strip() for task in pathlib.Path("/proc/self/task").glob("*/comm"))
    return sum(name == "pt_gloo_runloop" for name in names)

dist.init_process_group("gloo", store=dist.FileStore(sys.argv[1], 1), rank=0, world_size=1)
q = torch.randn(1, 20, 2, 8)
with torch.profiler.profile():
    dilated_attention(q, q, q, [8], [1], group=dist.group.WORLD)
before = gloo_threads()
dist.destroy_process_group()
gc.collect()
print(before > 0, gloo_threads())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_a_group_ends_where_it_is_destroyed(tmp_path: Path) -> None:
    """Whatever imported torch.distributed.nn meanwhile; a profiler does."""
    command = [sys.executable, "-c", PROFILED, str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "0"]


def warned(size: int) -> list[str]:
    group = group_of(size)
    said = advice._given.copy()
    advice._given.clear()
    rows = make_qkv(32, 4, 8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for strategy in ("all_to_all", "gather"):
            # The pattern covers every position; its second branch, by itself, doesn't.
            sharding: dict[str, Any] = {"group": group, "strategy": strategy}
            dilated_attention(*rows, [16, 64], [1, 2], head_offsets="blocked", **sharding)
    advice._given.update(said)
    return [str(warning.message) for warning in caught if "should" in str(warning.message)]


def test_parts_of_a_pattern_are_not_advised_on(workers: Processes) -> None:
    assert workers.run(2, warned) == [[], []]


def zigzag(size: int) -> None:
    group = group_of(size)
    lengths = [9, 4, 11, 5, 7, 12]
    options: dict[str, Any] = {"shard_lengths": lengths, "shard_layout": "zigzag"}
    x = torch.randn(2, sum(lengths), 32, generator=torch.Generator().manual_seed(3))
    mine = shard(x, group, **options)
    torch.manual_seed(0)
    whole = MultiheadDilatedAttention(32, 4, *BRANCHES)
    torch.manual_seed(0)
    layer = MultiheadDilatedAttention(32, 4, *BRANCHES, group=group, **options)
    assert "shard_layout='zigzag'" in repr(layer)
    expected = shard(whole(x, is_causal=True)[0], group, **options)
    torch.testing.assert_close(layer(mine, is_causal=True)[0], expected)
    qkv = make_qkv(sum(lengths), 4, 8)
    rows = [shard(t, group, **options) for t in qkv]
    expected = shard(dilated_attention(*qkv, *BRANCHES, is_causal=True), group, **options)
    module = RingDilatedAttentionV2(*BRANCHES, group=group, **options)
    torch.testing.assert_close(module(*rows, is_causal=True), expected)
    for strategy in ("ring", "gather"):
        out = dilated_attention(
            *rows, *BRANCHES, is_causal=True, group=group, strategy=strategy, **options
        )
        torch.testing.assert_close(out, expected)
    expect(
        ValueError,
        "shard_layout: must be 'contiguous' with strategy 'all_to_all'",
        lambda: dilated_attention(*rows, *BRANCHES, group=group, strategy="all_to_all", **options),
    )
    odd = [t[:, :5] for t in qkv]
    expect(
        ValueError,
        "shard_lengths: must be given where a rank's rows are no two equal stretches, got 5 rows",
        lambda: dilated_attention(*odd, *BRANCHES, group=group, shard_layout="zigzag"),
    )


def test_zigzag_in_functions_and_modules(workers: Processes) -> None:
    workers.run(3, zigzag)


def test_a_layout_needs_a_group() -> None:
    with pytest.raises(ValueError, match="shard_layout must be 'contiguous' where no group"):
        DilatedAttention(*BRANCHES, shard_layout="zigzag")
    with pytest.raises(ValueError, match="shard_layout must be one of .* got 'striped'"):
        DilatedAttention(*BRANCHES, shard_layout="striped")  # type: ignore[arg-type]
