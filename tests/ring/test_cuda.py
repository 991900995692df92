"""The ring on GPUs: over NCCL and copy engines where there are two; with one over gloo, through the
host.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from dilated_attention_pytorch import dilated_attention
from dilated_attention_pytorch.ring.group.communicator import Communicator
from dilated_attention_pytorch.ring.group.copy_engine import Transport
from tests.conftest import EXACT, make_qkv, missing_cuda
from tests.ops.calls import deterministic_mode
from tests.ring.processes import Processes, group_of
from tests.ring.sharded import Case, errors, rows_of_rank, run_ring
from tests.ring.test_later_calls import see

STRATEGIES = ("ring", "gather", "all_to_all", "auto")
TABLE = ((0, -1, 0, 1), (1, 0, 2, -1))
FOUR = {
    "four ranks": Case((64,) * 4, (64, 256), (1, 4), head_dim=64),
    "four ranks, causal": Case((45, 70, 3, 80), (60, 198), (1, 2), options={"is_causal": True}),
    "four ranks, causal zigzag": Case(
        (32,) * 8, (64, 256), (1, 4), head_dim=64, options={"is_causal": True}, layout="zigzag"
    ),
}
CASES = {
    "aligned": Case((64, 64), (32, 64, 128), (1, 2, 4), head_dim=64),
    "unequal": Case((45, 130), (37, 100, 175), (1, 3, 5), head_dim=48),
    "grouped heads": Case((80, 70), (64, 150), (1, 4), heads=8, kv_heads=2, head_dim=32),
    "table": Case((80, 70), (64, 150), (2, 4), head_dim=32, options={"head_offsets": TABLE}),
    "causal": Case((64, 70), (50, 134), (1, 2), head_dim=64, options={"is_causal": True}),
    "zigzag": Case((32,) * 4, (32, 128), (1, 4), head_dim=64, layout="zigzag"),
    "causal zigzag": Case(
        (40, 21, 70, 33),
        (50, 164),
        (1, 2),
        kv_heads=2,
        head_dim=64,
        options={"is_causal": True},
        layout="zigzag",
    ),
    "batch": Case(
        (80, 70),
        (50, 100),
        (1, 2),
        batch=1,
        head_dim=64,
        options={"is_causal": True, "sequences": ((3, 60), (63, 50), (120, 30))},
    ),
    "zeros": Case((64, 70), (50, 100), (1, 2), head_dim=64, options={"padding": "zeros"}),
}


def missing(backend: str, gpus: int = 2) -> str | None:
    """Why the backend can't be tested here."""
    if (reason := missing_cuda()) is not None:
        return reason
    if backend != "gloo" and torch.cuda.device_count() < gpus:
        return f"each of {gpus} processes needs a GPU of its own"
    return None


@pytest.fixture(scope="module")
def pair() -> Iterator[Processes]:
    if (reason := missing("gloo")) is not None:
        pytest.skip(reason)
    processes = Processes(2, timeout=60.0)
    yield processes
    processes.close()


@pytest.fixture(scope="module")
def quartet() -> Iterator[Processes]:
    if (reason := missing("nccl", gpus=4)) is not None:
        pytest.skip(reason)
    processes = Processes(4, timeout=60.0)
    yield processes
    processes.close()


@pytest.fixture
def mortals() -> Iterator[Processes]:
    """Processes whose groups a test may leave unusable."""
    if (reason := missing("nccl")) is not None:
        pytest.skip(reason)
    processes = Processes(2, timeout=20.0)
    yield processes
    processes.close()


@pytest.fixture(params=["gloo", "nccl", "copy engine"])
def backend(request: pytest.FixtureRequest) -> str:
    if (reason := missing(request.param)) is not None:
        pytest.skip(reason)
    return str(request.param)


_made: dict[str, dist.ProcessGroup] = {}


def group_on(backend: str, size: int) -> dist.ProcessGroup:
    """In a worker: a group of this backend, made once, and this rank's GPU made the current one."""
    rank = group_of(size).rank()
    torch.cuda.set_device(rank % torch.cuda.device_count())
    # Read at a group's first call.
    os.environ["DILATED_RING_COPY_ENGINE"] = str(int(backend == "copy engine"))
    if backend not in _made:
        name = "gloo" if backend == "gloo" else "nccl"
        _made[backend] = dist.new_group(list(range(size)), backend=name)
    return _made[backend]


def compare(size: int, backend: str, case: Case) -> tuple[Transport | None, list[dict[str, float]]]:
    """The transport, and errors of each strategy against the whole sequence in float64."""
    group = group_on(backend, size)
    rank = group.rank()
    whole = rows_of_rank(case.whole(), case, rank)
    single = Case(**{**vars(case), "dtype": torch.float32})
    found = []
    for strategy in strategies_of(case):
        result = run_ring(single, strategy, rank, group.group_name, "cuda")
        found.append(errors(type(result)(*(x.cpu().double() for x in result)), whole))
    return Communicator(group.group_name).transport, found


def strategies_of(case: Case) -> tuple[str, ...]:
    is_any = case.layout == "contiguous" and "sequences" not in case.options
    return tuple(s for s in STRATEGIES if s != "all_to_all" or is_any)


def check_errors(case: Case, found: list[dict[str, float]]) -> None:
    for strategy, each in zip(strategies_of(case), found, strict=True):
        for result, error in each.items():
            exact = EXACT["cuda"]
            limit = exact.backward if result.startswith("grad") else exact.forward
            assert error <= limit, f"{strategy}, {result}: {error:.1e}"


@pytest.mark.parametrize("name", FOUR)
@pytest.mark.parametrize("four_backend", ["nccl", "copy engine"])
def test_four_ranks_equal_the_whole(quartet: Processes, four_backend: str, name: str) -> None:
    for _, found in quartet.run(4, compare, four_backend, FOUR[name]):
        check_errors(FOUR[name], found)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_whole_on_gpus(pair: Processes, backend: str, name: str) -> None:
    expected = {"gloo": "staged", "nccl": "direct", "copy engine": "copy engine"}[backend]
    for transport, found in pair.run(2, compare, backend, CASES[name]):
        if backend == "copy engine" and transport == "direct":
            pytest.skip("no symmetric memory on this machine")
        assert transport == expected
        check_errors(CASES[name], found)


def repeat(size: int, backend: str, dtype: torch.dtype) -> bool:
    """Whether many calls on a busy GPU give the same bits: buffers outlive their transfers."""
    group = group_on(backend, size)
    case = Case((512, 512), (256, 512, 1024), (1, 2, 4), heads=8, kv_heads=8, dtype=dtype)
    with deterministic_mode():  # otherwise GPUs add 16-bit query gradients in any order
        for strategy in STRATEGIES:
            results = [
                run_ring(case, strategy, group.rank(), group.group_name, "cuda") for _ in range(20)
            ]
            for other in results[1:]:
                if not all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True)):
                    return False
    return True


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_repeats_bit_by_bit_on_gpus(pair: Processes, backend: str, dtype: torch.dtype) -> None:
    assert all(pair.run(2, repeat, backend, dtype))


def differ(size: int, backend: str, is_new: bool) -> tuple[str, str]:
    """What a rank sees where rank 1 calls with more rows than the others, and in its next call."""
    group = group_on(backend, size)
    # Made before anything may wait on the GPU for ever.
    rows = {n: make_qkv(n, 4, 32, dtype=torch.float32, device="cuda") for n in (40, 44, 48)}

    def call(length: int) -> None:
        dilated_attention(*rows[length], [16, 80], [1, 2], group=group, strategy="ring")

    call(40)
    if not is_new:
        call(48)
    torch.cuda.synchronize()
    usual = 44 if is_new else 40
    return see(call, 48 if group.rank() == 1 else usual), see(call, 40)


@pytest.mark.parametrize("name", ["nccl", "copy engine"])
def test_a_new_call_that_differs_is_refused_on_gpus(mortals: Processes, name: str) -> None:
    for now, later in mortals.run(2, differ, name, True):
        assert now.startswith("Disagreement: all ranks of the group") and "rows of query" in now
        assert later == "no error"


@pytest.mark.parametrize("name", ["nccl", "copy engine"])
def test_a_known_call_that_differs_raises_at_the_next_on_gpus(
    mortals: Processes, name: str
) -> None:
    """Its messages are under way already, so nobody waits for the device here."""
    mortals.start(differ, 2, name, False, ranks=range(2))
    for rank in range(2):
        now, later = mortals.result(rank, timeout=60.0)
        assert now == "no error"
        assert later.startswith("RuntimeError: all ranks of the group")
        assert "rows of query" in later and "can't be used again" in later
    for process in mortals.processes:
        process.kill()  # a GPU may wait for messages that never come
