"""attention_block_into: keys in two pairs of tensors, and only some of the query rows."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from dilated_attention_pytorch import ops
from tests.conftest import Exact, make_qkv
from tests.ops.calls import Result, assert_close, differentiate, output_gradients
from tests.planning import Spec, plan_tensor
from tests.reference import dropout_keep, reference_attention

Stretches = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Case:
    """A call of a sequence's stretches; `spec` holds all but dropout."""

    spec: Spec
    head_dim: int
    dropout_p: float = 0.0

    def positions(self, stretches: Stretches) -> Tensor:
        return torch.from_numpy(self.spec.positions(((0, 0), *stretches)))

    def rows(self, device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """query, key, value, far_key, far_value; far rows have other strides than near ones."""
        spec = self.spec
        options: dict[str, Any] = {"dtype": dtype, "device": device, "kv_heads": spec.kv_heads}
        query, key, value = make_qkv(spec.seq_len, spec.heads, self.head_dim, batch=2, **options)
        near, far = (self.positions(x).to(device) for x in (spec.keys, spec.far_keys))
        together = torch.stack([key[:, far], value[:, far]], 3)
        far_key, far_value = together.unbind(3)
        queries = self.positions(spec.queries).to(device)
        return query[:, queries], key[:, near], value[:, near], far_key, far_value

    def options(self, device: str) -> dict[str, Any]:
        spec = self.spec
        options: dict[str, Any] = {
            "is_causal": spec.is_causal,
            "padding": "zeros" if spec.zero_padding else "masked",
            "head_offsets": torch.tensor(spec.offset_table),
        }
        if self.dropout_p > 0:
            options |= {"dropout_p": self.dropout_p, "dropout_seed": torch.tensor([5]).to(device)}
        return options

    def into(
        self,
        out: Tensor,
        lse: Tensor,
        tensors: tuple[Tensor | None, ...],
        rows: str,
        pattern: Tensor | None = None,
    ) -> None:
        spec = self.spec
        ops.attention_block_into(
            out,
            lse,
            *tensors,
            spec.seq_len,
            *(sum(x, ()) for x in (spec.queries, spec.keys, spec.far_keys)),
            spec.segment_lengths,
            spec.dilation_rates,
            rows=rows,
            pattern=pattern,
            **self.options(str(out.device)),
        )

    def gradients(self, results: tuple[Tensor, Tensor], tensors: tuple[Tensor, ...]) -> Result:
        """From a block of near and one of far keys."""
        spec, (query, *keys) = self.spec, tensors
        sums = ops.make_query_sums(query)
        grads = []
        for at, positions in ((0, spec.keys), (2, spec.far_keys)):
            grads.append(
                ops.attention_block_backward_into(
                    sums,
                    *output_gradients(query),
                    query,
                    *keys[at : at + 2],
                    *results,
                    spec.seq_len,
                    sum(spec.queries, ()),
                    sum(positions, ()),
                    spec.segment_lengths,
                    spec.dilation_rates,
                    **self.options(str(query.device)),
                )
            )
        key, value = (torch.cat(pair, 1) for pair in zip(*grads, strict=True))
        return Result(*results, ops.round_query_sums(sums, query), key, value)

    def expected(self, tensors: tuple[Tensor, ...]) -> Result:
        spec = self.spec
        query, key, value, far_key, far_value = tensors
        whole = (query, torch.cat([key, far_key], 1), torch.cat([value, far_value], 1))
        inputs = [x.detach().to("cpu", torch.float64).requires_grad_() for x in whole]
        queries = self.positions(spec.queries)
        positions = (queries, self.positions((*spec.keys, *spec.far_keys)))
        options = self.options("cpu")
        if "dropout_seed" in options:
            seed = int(options.pop("dropout_seed"))
            options["keep"] = dropout_keep(seed, self.dropout_p, 2, spec.heads, *positions)
        outputs = reference_attention(
            *inputs,
            spec.segment_lengths,
            spec.dilation_rates,
            seq_len=spec.seq_len,
            positions=positions,
            **options,
        )
        gradients = output_gradients(query)
        return differentiate(outputs, inputs, tuple(x.cpu() for x in gradients))


def random_stretches(rng: random.Random, seq_len: int) -> tuple[Stretches, Stretches, Stretches]:
    """Of queries, near and far keys; mostly, as in a ring, the queries' own keys are near."""
    cuts = sorted(rng.sample(range(1, seq_len), rng.randint(1, 7)))
    pieces = list(zip([0, *cuts], [*cuts, seq_len], strict=True))
    kinds = [rng.choice(["near", "far", "far", "none"]) for _ in pieces]
    near, far = (
        tuple(piece for piece, kind in zip(pieces, kinds, strict=True) if kind == wanted)
        for wanted in ("near", "far")
    )
    queries = near if rng.random() < 0.7 and near else tuple(pieces[:: rng.randint(1, 2)])
    return queries, near, far


def random_case(seed: int, *, rates: tuple[int, ...] = (1, 2, 3, 4, 8, 16)) -> Case:
    rng = random.Random(seed)
    seq_len = rng.randint(8, 300)
    queries, near, far = random_stretches(rng, seq_len)
    branches = rng.randint(1, 4)
    kv_heads = rng.choice([1, 2, 4])
    heads = kv_heads * rng.choice([1, 2])
    chosen = [rng.choice(rates) for _ in range(branches)]
    spec = Spec(
        seq_len,
        [rng.randint(1, seq_len + 5) for _ in range(branches)],
        chosen,
        heads,
        kv_heads,
        [[rng.randint(-1, rate - 1) for _ in range(heads)] for rate in chosen],
        is_causal=rng.random() < 0.5,
        zero_padding=queries == near and rng.random() < 0.3,
        queries=queries,
        keys=near,
        far_keys=far,
        directions="forward",
    )
    return Case(spec, rng.choice([5, 16, 64, 128]), rng.choice([0.0, 0.0, 0.3]))


def run(case: Case, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """All rows at once; and in two calls, of which each writes rows that the other doesn't."""
    batch, rows, heads, _ = tensors[0].shape
    out, *parts = (torch.full_like(tensors[0], torch.nan).contiguous() for _ in range(3))
    wide = torch.float64 if out.dtype == torch.float64 else torch.float32
    lse, *part_lses = (out.new_full((batch, heads, rows), torch.nan, dtype=wide) for _ in range(3))
    case.into(out, lse, tensors, "all")
    assert not out.isnan().any() and not lse.isnan().any()
    case.into(parts[0], part_lses[0], (*tensors[:3], None, None), "near")
    case.into(parts[1], part_lses[1], tensors, "far")
    assert torch.equal(part_lses[0].isnan(), ~part_lses[1].isnan())
    is_near = ~part_lses[0].isnan()
    # Tiles may be of another height, and sums in another order.
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}
    for parted, whole in (
        (torch.where(is_near, *part_lses), lse),
        (torch.where(is_near.transpose(1, 2)[..., None], *parts), out),
    ):
        near = tolerance.get(whole.dtype, 2e-2)
        torch.testing.assert_close(parted, whole, rtol=near, atol=near)
    return out, lse


@pytest.mark.parametrize("block", range(10))
def test_equals_the_reference(block: int, device: str, exact: Exact) -> None:
    for seed in range(block * 30, block * 30 + 30):
        case = random_case(seed)
        tensors = case.rows(device, exact.dtype)
        assert_close(case.gradients(run(case, tensors), tensors), case.expected(tensors), exact)


@pytest.mark.parametrize("rates", [(1, 2, 4, 16), (3, 5, 8)], ids=["few maps", "many maps"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_kernels_read_both_tensors(dtype: torch.dtype, rates: tuple[int, ...]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    tolerance = Exact(dtype, *(2 * [16 * torch.finfo(dtype).eps]))
    for seed in range(60):
        case = random_case(1000 + seed, rates=rates)
        tensors = case.rows("cuda", dtype)
        results = run(case, tensors)
        assert_close(case.gradients(results, tensors), case.expected(tensors), tolerance)


def test_a_causal_row_is_near_if_only_later_keys_are_far() -> None:
    spec = Spec(20, [20], [1], keys=((0, 10),), far_keys=((10, 20),), queries=((0, 20),))
    for is_causal, near in ((False, 0), (True, 10)):
        case = Case(Spec(**{**vars(spec), "is_causal": is_causal, "directions": "forward"}), 4)
        query, *keys = case.rows("cpu", torch.float64)
        lse = torch.full((2, 1, 20), torch.nan, dtype=torch.float64)
        case.into(torch.empty_like(query), lse, (query, *keys), "near")
        assert int((~lse[0].isnan()).sum()) == near


def test_words_are_those_of_the_call() -> None:
    """A pattern of other rows, or of near keys alone, is refused."""
    case = random_case(3)
    tensors = case.rows("cpu", torch.float64)
    out, lse = run(case, tensors)
    spec = case.spec
    for change in ({"rows": "near"}, {"far_keys": ()}):
        words = plan_tensor(Spec(**{**vars(spec), **change}))
        with pytest.raises(ValueError, match="pattern"):
            case.into(out, lse, tensors, "all", words)


def good() -> dict[str, Any]:
    q, k, v = make_qkv(24, 4, 16, batch=2, kv_heads=2, dtype=torch.float32)
    return {
        "out": torch.empty_like(q[:, :8]),
        "lse": torch.empty(2, 4, 8),
        "query": q[:, :8],
        "key": k[:, :8],
        "value": v[:, :8],
        "far_key": k[:, 8:],
        "far_value": v[:, 8:],
        "seq_len": 24,
        "queries": [0],
        "keys": [0, 8],
        "far_keys": [8, 20, 20, 24],
        "segment_lengths": [24],
        "dilation_rates": [2],
    }


@pytest.mark.parametrize(
    "change, name, given",
    [
        ({"far_key": None}, "far_key", "None"),
        ({"far_value": None}, "far_value", "None"),
        ({"far_keys": [7]}, "far_keys", "7"),
        ({"far_keys": [9]}, "far_keys", "far_keys 9, rows 16, seq_len 24"),
        ({"far_keys": [8, 20]}, "far_keys", "16"),
        ({"far_keys": []}, "far_keys", r"16, got \[\]"),
        ({"keys": [0, 4, 3, 7]}, "keys", "begins at 3"),
        ({"queries": [0, 9]}, "queries", "8"),
        ({"queries": [5, 3, 3, 13]}, "queries", "begin 5, end 3"),
        ({"lse": torch.empty(2, 8, 4).transpose(1, 2)}, "lse", "strides"),
        ({"out": torch.empty(2, 8, 4, 16, dtype=torch.float64)}, "out", "float64"),
    ],
)
def test_refuses(change: dict[str, Any], name: str, given: str) -> None:
    ops.attention_block_into(*good().values())
    with pytest.raises(ValueError, match=rf"^{name}: must .*{given}"):
        ops.attention_block_into(*{**good(), **change}.values())


def test_refuses_unknown_rows_shared_memory_and_gradients() -> None:
    arguments = good()
    with pytest.raises(ValueError, match='rows: must be "all", "near" or "far", got "none"'):
        ops.attention_block_into(*arguments.values(), rows="none")
    with pytest.raises(ValueError, match="out: must not share memory with query"):
        shared = arguments["query"].contiguous()
        ops.attention_block_into(*{**arguments, "query": shared, "out": shared}.values())
    key = arguments["key"].clone().requires_grad_()
    with pytest.raises(RuntimeError, match="key: must not require a gradient"):
        ops.attention_block_into(*{**arguments, "key": key}.values())


def test_both_results_count_as_written() -> None:
    arguments = good()
    ops.attention_block_into(*arguments.values())
    assert (arguments["out"]._version, arguments["lse"]._version) == (1, 1)
