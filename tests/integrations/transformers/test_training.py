"""Models on dilated attention under DDP, FSDP2, PEFT and accelerate."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.integrations.transformers.models import IDS, SPARSE, llama
from tests.ring.processes import Processes, group_of


@pytest.fixture(scope="module")
def workers() -> Iterator[Processes]:
    processes = Processes(2)
    yield processes
    processes.close()


def gradients_of_both(size: int, wrapper: str) -> None:
    """Of a batch whose rows two ranks share; wrappers take the mean over ranks."""
    group = group_of(size)
    model = llama("dilated", dilated_attention=SPARSE)
    parallel: nn.Module = model
    if wrapper == "ddp":
        parallel = DistributedDataParallel(model, process_group=group)
    else:
        for layer in model.model.layers:
            fully_shard(layer, mesh=DeviceMesh.from_group(group, "cpu"))
        fully_shard(model, mesh=DeviceMesh.from_group(group, "cpu"))
    row = IDS[group.rank() :][:1]
    parallel(input_ids=row, labels=row).loss.backward()
    alone = llama("dilated", dilated_attention=SPARSE)
    alone(input_ids=IDS, labels=IDS).loss.backward()
    for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        grad = ours.grad.full_tensor() if wrapper == "fsdp" else ours.grad
        torch.testing.assert_close(grad, theirs.grad)


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_gradients_beside_ddp_and_fsdp(workers: Processes, wrapper: str) -> None:
    workers.run(2, gradients_of_both, wrapper)


def trained(model):
    """The loss before and after some steps."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    losses = []
    for _ in range(5):
        loss = model(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


def test_lora():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(llama("dilated", dilated_attention=SPARSE), config)
    before, after = trained(model)
    assert after < before
    merged = model.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, model(IDS).logits)


def test_prefix_tuning_is_refused():
    peft = pytest.importorskip("peft")
    config = peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model = peft.get_peft_model(llama("dilated", dilated_attention=SPARSE), config)
    with pytest.raises(ValueError, match="key_cache must not require a gradient"):
        model(input_ids=IDS, labels=IDS)


def test_accelerate():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = accelerator.prepare(llama("dilated", dilated_attention=SPARSE))
    loss = model(input_ids=IDS, labels=IDS).loss
    accelerator.backward(loss)
    assert all(p.grad is not None for p in model.parameters())
