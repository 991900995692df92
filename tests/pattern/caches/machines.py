"""What the caches are tested on: a model of a GPU, and a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dilated_attention_pytorch import PatternCache, TieredPatternCache
from dilated_attention_pytorch.pattern import BasePatternCache

from .fake_device import FakeDevice


class FakeMachine:
    """The model, under the name of a GPU."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", 0)
        self.fake = FakeDevice()
        self.stream, self.graph, self.read = self.fake.on, self.fake.graph, self.fake.read

    def attach(self, cache: BasePatternCache) -> None:
        cache._transfers = self.fake

    def keep_busy(self) -> None:
        pass  # its copies are late anyway

    def reuse_memory(self, like: Tensor) -> None:
        pass  # it is overwritten as soon as it may be

    def finish(self) -> list[Tensor]:
        """All work is done. What reads saw since the last time."""
        self.fake.run()
        seen, self.fake.seen = self.fake.seen, []
        return seen


class CudaMachine:
    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._streams: dict[int, torch.cuda.Stream] = {}
        self._busy = torch.randn(4096, 4096, device=self.device)
        self._reads: list[Tensor] = []
        self._graph_reads: list[Tensor] = []

    def attach(self, cache: BasePatternCache) -> None:
        pass

    def stream(self, number: int) -> contextlib.AbstractContextManager[object]:
        if number == 0:
            return contextlib.nullcontext()
        self._streams.setdefault(number, torch.cuda.Stream(self.device))
        return torch.cuda.stream(self._streams[number])

    def keep_busy(self) -> None:
        """Some milliseconds of work on the current stream."""
        for _ in range(20):
            torch.mm(self._busy, self._busy)

    def read(self, words: Tensor) -> None:
        self._reads.append(words.clone())

    @contextlib.contextmanager
    def graph(self) -> Iterator[Callable[[], None]]:
        before, graph = len(self._reads), torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            yield graph.replay
        self._graph_reads += self._reads[before:]
        del self._reads[before:]

    def reuse_memory(self, like: Tensor) -> None:
        """Fills what memory of that size the allocator gives out."""
        self._junk = [torch.full_like(like, -1, device=self.device) for _ in range(64)]

    def finish(self) -> list[Tensor]:
        torch.cuda.synchronize()
        seen = [words.cpu() for words in (*self._reads, *self._graph_reads)]
        self._reads, self._graph_reads = [], []
        return seen


Machine = FakeMachine | CudaMachine


def promoting(**settings: int) -> TieredPatternCache:
    """A tiered cache in which one look-up makes a pattern hot."""
    return TieredPatternCache(promote_after=1, **settings)


Make = Callable[..., BasePatternCache]
MAKERS = {"v2": PatternCache, "v3": TieredPatternCache, "v3-promoting": promoting}
