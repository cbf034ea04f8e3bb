"""Where the processes that torchrun started find each other, anew after every restart.

torchrun keeps one key-value store for as long as it lives, and its count of restarts may differ
between machines. A process that was started again would read addresses there which one that has
died left behind. So the first process invents a name for every attempt, and the others ask for it:

    rank r          asks/r = token of its own             waits for answer/token
    first process   reads all asks/r, again and again     answer/token = name, until all have it

A question left from an earlier attempt is answered in vain, and its process asks again.
"""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]


def meet(rank: int, world_size: int, timeout: timedelta) -> Store:
    """The store of this attempt, the same for all processes and for no others.

    Raises: TimeoutError naming the processes that did not come; RuntimeError of the store itself.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, timeout=timeout)
    mailbox = PrefixStore("longtake/meeting", store)
    name = _tell(mailbox, world_size, timeout) if rank == 0 else _ask(mailbox, rank)
    return PrefixStore(f"longtake/{name}", store)


def _ask(mailbox: Store, rank: int) -> str:
    token = uuid.uuid4().hex
    mailbox.set(f"asks/{rank}", token)
    name = mailbox.get(f"answer/{token}").decode()
    mailbox.set(f"{name}/{rank}", "")
    return name


def _tell(mailbox: Store, world_size: int, timeout: timedelta) -> str:
    name = uuid.uuid4().hex
    waiting = set(range(1, world_size))
    deadline = time.monotonic() + timeout.total_seconds()
    while waiting:
        for rank in sorted(waiting):
            if mailbox.check([f"{name}/{rank}"]):
                waiting.remove(rank)
            elif mailbox.check([f"asks/{rank}"]):
                token = mailbox.get(f"asks/{rank}").decode()
                mailbox.set(f"answer/{token}", name)
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"{len(waiting)} of {world_size} processes did not come within "
                f"{timeout.total_seconds():.0f} s, the first of them rank {min(waiting)}: see what "
                "they printed"
            )
        time.sleep(0.02)
    return name
