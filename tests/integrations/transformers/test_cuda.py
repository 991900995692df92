"""On a GPU a model says and writes what it does on the CPU in float64."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import missing_cuda
from tests.integrations.transformers.models import CACHE, IDS, SPARSE, llama
from tests.integrations.transformers.test_cache import GREEDY, LEFT, PROMPT, forgetting, written
from tests.integrations.transformers.test_cache import static as compiled

pytestmark = pytest.mark.skipif(missing_cuda() is not None, reason=str(missing_cuda()))


def static():
    return compiled() | {"disable_compile": True}


def model_on(device, dtype):
    return llama("dilated", dilated_attention=SPARSE).to(device, dtype)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2), (torch.float16, 1e-2)]
)
def test_logits_and_gradients(dtype, tolerance):
    def results(model, ids, mask):
        out = model(ids, attention_mask=mask, labels=ids)
        return out.logits, *torch.autograd.grad(out.loss, list(model.parameters()))

    mask = torch.ones_like(IDS)
    mask[0, 50:] = 0
    expected = results(model_on("cpu", torch.float64), IDS, mask)
    actual = results(model_on("cuda", dtype), IDS.cuda(), mask.cuda())
    for x, y in zip(actual, expected, strict=True):
        assert (x.cpu().double() - y).norm() <= tolerance * y.norm()


@pytest.mark.parametrize("cache", [dict, static, compiled, forgetting])
def test_what_generate_writes(cache):
    expected = written(model_on("cpu", torch.float64), attention_mask=LEFT, **GREEDY)
    model = model_on("cuda", torch.float32)
    options = {"attention_mask": LEFT.cuda()} | cache() | GREEDY
    assert torch.equal(written(model, PROMPT.cuda(), **options).cpu(), expected)


@torch.no_grad()
def test_steps_in_16_bits():
    model = model_on("cuda", torch.bfloat16)
    options = forgetting()
    first = model(IDS[:, :70].cuda(), **options).logits
    steps = [model(IDS[:, i : i + 1].cuda(), **options).logits for i in range(70, 83)]
    whole = model_on("cpu", torch.float64)(IDS, use_cache=False).logits
    actual = torch.cat([first, *steps], 1).cpu().double()
    assert (actual - whole).norm() <= 5e-2 * whole.norm()
    assert options[CACHE].get_seq_length() == 83
