"""Ranks compare what they are about to do, before or while their messages travel.

Ranks that exchange different numbers of bytes hang, abort or compute nonsense. So each casts a
ballot for its call: a digest of the call's number and fields. If these differ, or a rank refuses
its call, all publish their fields, or why they refuse, in the group's key-value store, read the
others' and raise the same error. Knows no torch.distributed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .ballot import REFUSED, Ballot
from .store import Patience, Store, name_ranks, reaching_the_store


class Fields(Mapping[str, str]):
    """What must be equal on all ranks, by name, with a digest of it all."""

    def __init__(self, fields: Mapping[str, str]) -> None:
        self._fields = dict(fields)
        self.digest = _digest(str(self._fields).encode())

    def __getitem__(self, name: str) -> str:
        return self._fields[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


class Disagreement(ValueError):
    """Ranks were called with different arguments, or one of them refused its own."""


class Agreement:
    """One rank's side. Rounds are numbered: all ranks come to them in the same order.

    A rank deletes what it published once all have come to a later round, and so have read it.

    Args:
        store: shared by the ranks.
        ballot: shows whether all ranks agree.
    """

    def __init__(
        self, store: Store, ballot: Ballot, rank: int, size: int, patience: Patience
    ) -> None:
        self._store, self._ballot, self._patience = store, ballot, patience
        self._rank, self._size = rank, size
        self._number = 0
        self._published: list[int] = []

    def compare(self, fields: Fields, *, has_posted: bool = False) -> None:
        """Returns once all ranks have come with equal fields.

        has_posted: this rank posts the call's messages without waiting for the outcome.

        Raises:
            Disagreement: naming fields and ranks, the same on all; or the rank that refused.
            RuntimeError: the same, but some have posted messages that the others don't expect; or
                a rank did not come within the timeout, or the store is gone.
        """
        number = self._next()
        digest = _digest(number.to_bytes(8, "big") + fields.digest)
        self._ballot.cast(number, digest)
        if self._ballot.is_unanimous(number, digest):
            self._forget(number)
            return
        self._publish(number, {"fields": dict(fields), "has_posted": has_posted})
        raise _difference(self._read(number))

    def gather(self, value: Any) -> list[Any]:
        """What each rank passes, as JSON; raises RuntimeError as `compare` does."""
        number = self._next()
        self._publish(number, {"value": value})
        return [entry["value"] for entry in self._read(number)]

    def refuse(self, error: str, *, may_have_posted: bool = False) -> None:
        """Tells the others that this rank raises, without waiting for them.

        may_have_posted: the others post without waiting for the outcome. Then this waits for them,
        and raises RuntimeError as `compare` does.
        """
        number = self._next()
        self._publish(number, {"error": error})
        self._ballot.cast(number, REFUSED)
        if may_have_posted:
            difference = _difference(self._read(number))
            if not isinstance(difference, Disagreement):
                raise difference

    def _next(self) -> int:
        self._number += 1
        return self._number

    @reaching_the_store()
    def _read(self, number: int) -> list[dict[str, Any]]:
        """What all ranks have published, once they have."""
        keys = [self._key(number, rank) for rank in range(self._size)]
        for _ in self._patience.polls():
            if self._store.check(keys):
                break
        else:
            missing = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
            raise self._patience.absent(missing)
        entries = [json.loads(self._store.get(key)) for key in keys]
        self._forget(number)
        return entries

    @reaching_the_store()
    def _publish(self, number: int, entry: Mapping[str, object]) -> None:
        self._store.set(self._key(number, self._rank), json.dumps(entry))
        self._published.append(number)

    def _forget(self, number: int) -> None:
        """Deletes what was published before this round: all have come to it, so have read that."""
        while self._published and self._published[0] < number:
            self._store.delete_key(self._key(self._published.pop(0), self._rank))

    @staticmethod
    def _key(number: int, rank: int) -> str:
        return f"dilated/{number}/{rank}"


def _difference(entries: Sequence[Mapping[str, Any]]) -> Exception:
    """What all ranks raise where their calls differ."""
    text = _describe(entries)
    if not text:
        return RuntimeError("the group's ranks are at different calls: it can't be used again")
    if any(entry.get("has_posted") for entry in entries):
        return RuntimeError(
            f"{text}; ranks had begun the call, so its results are wrong and the group can't be "
            "used again"
        )
    return Disagreement(text)


def _describe(entries: Sequence[Mapping[str, Any]]) -> str:
    """Who refused its call, else how the calls differ; "" if they don't."""
    refused = [
        f"rank {rank} refused its arguments: {entry['error']}"
        for rank, entry in enumerate(entries)
        if "error" in entry
    ]
    if refused:
        return "; ".join(refused)
    differences = describe_differences([entry["fields"] for entry in entries])
    if not differences:
        return ""
    return f"all ranks of the group must pass the same arguments, got {differences}"


def describe_differences(entries: Sequence[Mapping[str, str]]) -> str:
    """The fields in which ranks differ, with each value and the ranks that have it; "" if none."""
    texts = []
    for name in dict.fromkeys(name for entry in entries for name in entry):
        holders: dict[str, list[int]] = {}
        for rank, entry in enumerate(entries):
            holders.setdefault(entry.get(name, "nothing"), []).append(rank)
        if len(holders) > 1:
            values = ", ".join(f"{value} on {name_ranks(r)}" for value, r in holders.items())
            texts.append(f"{name}: {values}")
    return "; ".join(texts)
