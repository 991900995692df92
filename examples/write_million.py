"""Writes a million bytes with a small LongNet: as fast at the end as at the beginning, in the same
memory. Beside it, dense attention over a cache of everything that was written.

    python examples/write_million.py                        # writes million.json
    python examples/write_million.py --plot million.json million.svg

The model is byte_model.py's, untrained unless `--checkpoint` names one of train_bytes.py: what it
costs to write does not depend on what is written. On a GPU a step, the drawing of the byte
included, is one CUDA graph. The dense model has the same layers and is timed at lengths that
double; what it would write is not written.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from byte_model import LOOK_BACK, ByteModel
from torch import Tensor, nn

from dilated_attention_pytorch import MultiheadDilatedAttention

SHAPE = {
    "width": 128,
    "layers": 2,
    "num_heads": 4,
    "segment_lengths": (2048, 4096, 8192, 16384, 32768),
    "dilation_rates": (1, 2, 4, 8, 16),
}
_TIMED = 20  # dense steps at a length


class Writer:
    """A text that grows by a byte a step, drawn from the model; `caches` are the blocks'."""

    def __init__(self, model: ByteModel, caches: list[Any], device: torch.device) -> None:
        self.model, self.caches = model, caches
        self.tail = torch.zeros(1, LOOK_BACK + 1, dtype=torch.int64, device=device)
        self.position = torch.full((1,), LOOK_BACK, device=device)
        self.write = self._step
        if device.type == "cuda":
            self._capture()

    def _step(self) -> None:
        logits = self.model(self.tail, self.position, kv_caches=self.caches)[0, -1]
        following = torch.multinomial(logits.float().softmax(0), 1)
        self.tail.copy_(torch.cat([self.tail[:, 1:], following[None]], 1))
        self.position += 1

    def _capture(self) -> None:
        caches, self.caches = self.caches, copy.deepcopy(self.caches)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._step()  # what a model does once, it does before the capture
        torch.cuda.current_stream().wait_stream(side)
        self.caches = caches
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        self.write = graph.replay


class DenseAttention(nn.Module):
    """The layer's projections, and attention to all of a cache of `length` positions."""

    def __init__(self, layer: MultiheadDilatedAttention) -> None:
        super().__init__()
        self.layer = layer

    def forward(
        self, x: Tensor, *, is_causal: bool, seq_lens: Tensor | None, kv_cache: Tensor
    ) -> tuple[Tensor, None]:
        layer = self.layer
        rows = (layer.q_proj(x), layer.k_proj(x), layer.v_proj(x))
        query, *new = (row.view(1, 1, -1, layer.head_dim).transpose(1, 2) for row in rows)
        kv_cache[:, :, :, -1] = torch.stack([row[:, :, 0] for row in new])
        out = F.scaled_dot_product_attention(query, *kv_cache)
        return layer.out_proj(out.transpose(1, 2).flatten(2)), None


def make_model(checkpoint: Path | None, device: torch.device) -> ByteModel:
    torch.manual_seed(0)
    if checkpoint is None:
        return ByteModel(**SHAPE).to(device).eval()
    state = torch.load(checkpoint, map_location=device, weights_only=True)
    config = state["config"]
    shape = {name: config[name] for name in ("width", "layers", *list(SHAPE)[3:])}
    model = ByteModel(num_heads=config["heads"], **shape).to(device)
    model.load_state_dict(state["model"])
    return model.eval()


def seconds_of(call: Callable[[], object], count: int, device: torch.device) -> float:
    """A call's, on average, until the device is done."""
    began = time.perf_counter()
    for _ in range(count):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / count


def forgetting(model: ByteModel, size: int, device: torch.device) -> Iterator[dict[str, float]]:
    caches = [block.attention.make_kv_cache(1) for block in model.blocks]
    writer = Writer(model, caches, device)
    part = max(1, size // 100)
    for written in range(part, size + 1, part):
        seconds = seconds_of(writer.write, part, device)
        nbytes = sum(cache.nbytes for cache in caches)
        yield {"position": written, "ms": 1e3 * seconds, "cache_bytes": nbytes}


def dense(model: ByteModel, size: int, device: torch.device) -> Iterator[dict[str, float]]:
    model = copy.deepcopy(model)
    layer = model.blocks[0].attention
    for block in model.blocks:
        block.attention = DenseAttention(block.attention)
    length = min(1024, size)
    while length <= size:
        shape = (2, 1, layer.num_heads, length, layer.head_dim)
        caches = [torch.randn(shape, device=device) for _ in model.blocks]
        writer = Writer(model, caches, device)
        writer.write()
        seconds = seconds_of(writer.write, _TIMED, device)
        nbytes = sum(cache.nbytes for cache in caches)
        yield {"position": length, "ms": 1e3 * seconds, "cache_bytes": nbytes}
        length *= 2


def draw(measured: Path, picture: Path) -> None:
    """Milliseconds a byte and the caches' memory, both over the length written."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "million"
    figures = json.loads(measured.read_text())
    figure = Figure(figsize=(8.0, 3.0), layout="constrained")
    left, right = figure.subplots(ncols=2)
    figure.suptitle(f"Writing with {figures['model']}, {figures['device']}", fontsize=10)
    names = {"forgets": "a cache that forgets", "dense": "dense attention, everything kept"}
    for name, label in names.items():
        places = [row["position"] for row in figures[name]]
        left.plot(places, [row["ms"] for row in figures[name]], label=label)
        right.plot(places, [row["cache_bytes"] / 2**20 for row in figures[name]], label=label)
    for axes, title in ((left, "milliseconds a byte"), (right, "MiB of keys and values")):
        axes.set(xlabel="bytes written", ylabel=title, yscale="log")
        axes.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
    left.legend()
    figure.savefig(picture, metadata={"Date": None})


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--bytes", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, default=Path("million.json"))
    parser.add_argument("--checkpoint", type=Path, help="of train_bytes.py")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--plot", type=Path, nargs=2, metavar=("JSON", "PICTURE"))
    options = parser.parse_args()
    if options.plot:
        draw(*options.plot)
        return
    device = torch.device(options.device)
    model = make_model(options.checkpoint, device)
    is_cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if is_cuda else f"{torch.get_num_threads()} CPU cores"
    parameters = sum(x.numel() for x in model.parameters())
    figures: dict[str, Any] = {"device": name, "model": f"{parameters:,} parameters"}
    for way, measure in (("forgets", forgetting), ("dense", dense)):
        figures[way] = []
        for row in measure(model, options.bytes, device):
            figures[way].append(row)
            megabytes = row["cache_bytes"] / 2**20
            print(f"{way}: {row['position']:,} bytes, {row['ms']:.3f} ms, {megabytes:.1f} MiB")
            options.out.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
