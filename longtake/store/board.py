"""The lists of work that are open, as several processes see them through the store's folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longtake.store.claims import Claim, take_claim
from longtake.store.plan import Group, WorkList
from longtake.store.shards import Failure, Record, shard_names, shards_folder, write_shard


@dataclass
class Tally:
    """What a run has done so far, for whoever watches."""

    total: int = 0
    """Clips and captions to be encoded, by all processes."""
    done: int = 0
    """Of those, by this process; with the failed ones."""
    elsewhere: int = 0
    """By other processes, as far as noticed: whenever this one writes a shard."""
    bytes_written: int = 0
    """By all."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Why clips failed -> how many, in this process."""
    encoded: dict[Group, tuple[int, float]] = field(default_factory=dict)
    """Items that this process's encoders took, and their seconds."""
    on_change: Callable[[Tally], None] = lambda tally: None


class Board:
    """Gives out lists of work, each to one process at a time, and takes their results."""

    def __init__(
        self,
        store: Path,
        work: Sequence[WorkList],
        tally: Tally,
        *,
        share: int = 0,
        shares: int = 1,
    ) -> None:
        self.store, self.tally = store, tally
        # A process's own share first, then what the others have not come to.
        ordered = [item for k in range(shares) for item in work[(share + k) % shares :: shares]]
        self.open = {_name(item): item for item in ordered}
        self._held: dict[str, Claim] = {}

    def offer(self) -> Iterator[WorkList]:
        """Every open list that no other process holds, once around; the taker finishes it."""
        for name, item in list(self.open.items()):
            if name not in self.open:
                continue
            claim = take_claim(self.store, name)
            if claim is None:
                continue
            self._notice_others()
            if name not in self.open:
                claim.release()
                continue
            del self.open[name]
            self._held[name] = claim
            yield item

    def _notice_others(self) -> None:
        """Strikes off what other processes have done."""
        for shard in shard_names(self.store):
            item = self.open.pop(shard.rpartition("-")[0], None)
            if item is not None:
                self.tally.elsewhere += item.num_items
                with suppress(FileNotFoundError):  # set aside this moment, being damaged
                    size = (shards_folder(self.store) / shard).stat().st_size
                    self.tally.bytes_written += size
        self.tally.on_change(self.tally)

    def finish(
        self,
        item: WorkList,
        records: Sequence[Record],
        failures: Sequence[Failure],
        notes: dict[str, Any],
    ) -> None:
        """Writes what became of a list that was taken."""
        path = write_shard(self.store, item.kind, item.name, records, failures, notes)
        self._held.pop(_name(item)).release()
        self.tally.bytes_written += path.stat().st_size
        self._notice_others()

    def time(self, item: WorkList, num_items: int, seconds: float) -> None:
        """Notes how long the encoder took for some items of a list."""
        before = self.tally.encoded.get(item.group, (0, 0.0))
        self.tally.encoded[item.group] = (before[0] + num_items, before[1] + seconds)

    def count(self, num_items: int, failures: Sequence[Failure] = ()) -> None:
        """Notes items that were encoded, or failed, and wait to be written."""
        self.tally.done += num_items + len(failures)
        self.tally.reasons.update(failure.reason for failure in failures)
        self.tally.on_change(self.tally)


def _name(item: WorkList) -> str:
    return f"{item.kind}-{item.name}"


def remove_leftovers(store: Path) -> None:
    """Removes what processes that are gone left: half-written shards, claims."""
    for temporary in shards_folder(store).glob(".*.tmp"):
        claim = take_claim(store, temporary.name.split(".")[1])
        if claim is not None:
            temporary.unlink(missing_ok=True)
            claim.release()
    for path in (store / "claims").glob("*.lock"):
        claim = take_claim(store, path.stem)
        if claim is not None:
            claim.release()
