"""The processes that share an evaluation: how they meet, tell each other things, and end together.

torchrun, accelerate or srun start them, and they meet in torch.distributed: a gloo group carries
what all take part in, and its store what nobody waits for: answers, progress, signs of life. Where
one process fails or is gone, the others learn it there and end, too.
"""

from __future__ import annotations

import atexit
import gc
import logging
import os
import pickle
import socket
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from tqdm import tqdm

T = TypeVar("T")

FOREVER = timedelta(weeks=52)  # a process may wait in a collective until others have computed
_ARRIVAL = timedelta(minutes=10)  # for all processes to have been started
_BEAT = 1.0  # seconds from one sign of life to the next
_PATIENCE = 30.0  # seconds without one until a process is taken for gone,
_HURRY = 4.0  # and where another one has lost its connection to somebody
_GRACE = 10.0  # seconds to put away what was computed, when the run has ended
_MESSAGE = 1 << 22  # bytes: the store takes 8 MiB at a time


class Lost(RuntimeError):
    """The run has ended with another process, and what there is to say has been said."""


@dataclass(frozen=True)
class Place:
    """Where the launcher has put this process: rank `rank` of `size`, the first one's address."""

    rank: int
    size: int
    host: str
    port: int


def find_place(environment: Mapping[str, str] = os.environ) -> Place | None:
    """This process's place among those of a launcher; None: it is alone.

    torchrun and accelerate set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; srun sets variables
    of its own, and the user the last two.

    Raises:
        ValueError: there are several processes, and nothing says where they meet.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        names = "RANK", "WORLD_SIZE"
        mend = "start with torchrun or accelerate launch, or set both"
    elif "SLURM_PROCID" in environment and "SLURM_STEP_NUM_TASKS" in environment:
        names = "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"
        mend = (
            "export both before srun, such as MASTER_ADDR=$(scontrol show hostnames "
            "$SLURM_JOB_NODELIST | head -n 1) and MASTER_PORT=29500; or export RANK=0 and "
            "WORLD_SIZE=1 where each task is an evaluation of its own"
        )
    else:
        return None
    rank, size = (int(environment[name]) for name in names)
    if size == 1:
        return None
    host, port = (environment.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    if not host or not port.isdecimal():
        raise ValueError(
            f"{names[1]} is {size}, but MASTER_ADDR and MASTER_PORT do not say where the "
            f"processes meet; {mend}"
        )
    return Place(rank, size, host, int(port))


_joined: Ranks | None = None
_silent = False


def join() -> Ranks | None:
    """The group of all processes of this run, joined when first asked for; None: there is one.

    Of a process that is not the first, no warnings, logs and progress bars are seen from then on.
    """
    global _joined
    place = find_place()
    if _joined is None and place is not None:
        _joined = Ranks(place)
    return _joined


class Ranks:
    """The processes of one run.

    Args:
        place: of this one.

    Attributes:
        rank, size: of this process, and how many there are.
        neighbours: the ranks of those on the same machine, this one's own among them.
        local_rank, local_size: among those.
        working: whether others count on this process, so that it must not just leave.

    Raises:
        ValueError: not all have come. Methods raise `Lost` once another process has failed.
    """

    def __init__(self, place: Place) -> None:
        self.rank, self.size = place.rank, place.size
        # torchrun has a store of its own; otherwise the first process has it.
        self._hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
        self._address = place.host, place.port
        server = self._connect(self._hosted)
        if dist.is_initialized():
            self._group = dist.new_group(backend="gloo", timeout=FOREVER)
        else:
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = dist.PrefixStore(f"yoco-eval/{attempt}", server)
            dist.init_process_group(
                "gloo", store=store, rank=self.rank, world_size=self.size, timeout=FOREVER
            )
            self._group = dist.group.WORLD
        self._ended = threading.Event()
        self._leaving = threading.Event()
        self._disconnected: str | None = None
        self.working = False
        own = socket.gethostname(), os.getpid(), uuid.uuid4().hex
        self._names = self._collect(own)
        self._key = f"yoco-eval/{self._names[0][2]}"
        self._store, self._read = self._connect(), 0
        self._sign(self._store, 0)
        self._collect(None)
        hosts = [host for host, _, _ in self._names]
        self.neighbours = [rank for rank, host in enumerate(hosts) if host == own[0]]
        self.local_size = len(self.neighbours)
        among = self.neighbours.index(self.rank)
        self.local_rank = int(os.environ.get("LOCAL_RANK", among))
        self._alive = time.monotonic()
        self._threads = [
            threading.Thread(target=target, daemon=True) for target in (self._watch, self._guard)
        ]
        for thread in self._threads:
            thread.start()
        self._usual_hook, sys.excepthook = sys.excepthook, self._fail
        atexit.register(self._leave)
        silence_others()

    # -- what all take part in ---------------------------------------------------------------------

    def collect(self, own: T) -> list[T]:
        """What each process has, in the order of ranks."""
        self.check()
        return self.unless_lost(self._collect, own)

    def wait(self) -> None:
        """Until all processes have come here."""
        self.collect(None)

    def gather(self, own: T) -> list[T] | None:
        """What each process has, for the first one; None for the others."""
        self.check()
        everyones: list[Any] | None = None if self.rank else [None] * self.size
        self.unless_lost(dist.gather_object, own, everyones, dst=0, group=self._group)
        return everyones

    def scatter(self, each: Sequence[T] | None) -> T:
        """What the first process has for this one; the others give None."""
        self.check()
        received: list[Any] = [None]
        given = None if each is None else list(each)
        self.unless_lost(dist.scatter_object_list, received, given, src=0, group=self._group)
        return received[0]

    def _collect(self, own: T) -> list[T]:
        everyones: list[Any] = [None] * self.size
        dist.all_gather_object(everyones, own, group=self._group)
        return everyones

    def unless_lost(self, function: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """What a function of torch.distributed returns; `Lost` where it fails because a process is
        gone, once it is known which one."""
        try:
            return function(*arguments, **options)
        except RuntimeError as error:  # torch's, where a process at the other end is gone
            self._disconnected = str(error).splitlines()[0]
            self._ended.wait(2 * _HURRY + _GRACE)
            raise Lost from None

    # -- what nobody waits for ---------------------------------------------------------------------

    def post(self, rank: int, things: Sequence[Any]) -> None:
        """Sends things to a process, which finds them in its `mail`."""
        self.unless_lost(self._post, rank, things)

    def mail(self) -> list[Any]:
        """What was sent to this process since the last time."""
        return self.unless_lost(self._mail)

    def add(self, name: str, number: int) -> int:
        """Adds to a number that all processes share, 0 at first, and gives it."""
        return self.unless_lost(self._store.add, f"{self._key}/{name}", number)

    def check(self) -> None:
        """Raises `Lost` if another process has failed."""
        if self._ended.is_set():
            raise Lost

    def _post(self, rank: int, things: Sequence[Any]) -> None:
        message = pickle.dumps(things)
        if len(message) > _MESSAGE and len(things) > 1:
            half = len(things) // 2
            self._post(rank, things[:half])
            self._post(rank, things[half:])
            return
        box = f"{self._key}/mail/{rank}"
        self._store.set(f"{box}/{self._store.add(box, 1)}", message)

    def _mail(self) -> list[Any]:
        box, things = f"{self._key}/mail/{self.rank}", []
        count = self._store.add(box, 0)
        while self._read < count:
            self._read += 1
            key = f"{box}/{self._read}"
            things += pickle.loads(self._store.get(key))
            self._store.delete_key(key)
        return things

    # -- life and death ----------------------------------------------------------------------------

    def _connect(self, hosted: bool = False) -> dist.TCPStore:
        """A connection of one's own: each thread has one, since a store makes others wait.

        Args:
            hosted: whether the first process is to open the store, and all to wait for each other.
        """
        host, port = self._address
        try:
            return dist.TCPStore(
                host,
                port,
                self.size if hosted else None,
                is_master=hosted and self.rank == 0,
                timeout=_ARRIVAL,
                wait_for_workers=hosted,
            )
        except RuntimeError as error:
            raise ValueError(
                f"not all {self.size} processes have come to {host}:{port}: "
                f"{str(error).splitlines()[0]}"
            ) from None

    def _sign(self, store: dist.Store, sign: int) -> None:
        store.set(f"{self._key}/alive/{self.rank}", str(sign))

    def _signs(self, store: dist.Store, ranks: Sequence[int]) -> list[int]:
        """The last sign of each; -1 where it has left by itself."""
        return [int(sign) for sign in store.multi_get([f"{self._key}/alive/{r}" for r in ranks])]

    def _watch(self) -> None:
        """Gives signs of life and looks for the others': the first one for all, they for its."""
        seen: dict[int, tuple[int, float]] = {}
        sign, since = 0, None
        try:
            store = self._connect()
            while not self._leaving.wait(_BEAT):
                sign += 1
                self._sign(store, sign)
                if store.check([f"{self._key}/ended"]):
                    return self._end()
                if self._disconnected is not None and since is None:
                    since, seen = time.monotonic(), {}
                everyone = self.rank == 0 or since is not None
                watched = [r for r in (range(self.size) if everyone else (0,)) if r != self.rank]
                now, patience = time.monotonic(), _PATIENCE if since is None else _HURRY
                gone = []
                for rank, last in zip(watched, self._signs(store, watched), strict=True):
                    if rank not in seen or seen[rank][0] != last:
                        seen[rank] = last, now
                    left = last < 0 and since is not None
                    if left or (last >= 0 and now - seen[rank][1] > patience):
                        gone.append(rank)
                self._alive = now
                if gone:
                    return self._end(self._claims(store, self._obituary(gone[0])))
                if since is not None and now - since > 2 * _HURRY:
                    lost = f"the processes have lost touch: {self._disconnected}"
                    return self._end(self._claims(store, lost))
        except (RuntimeError, ValueError) as error:
            if not self._leaving.is_set():
                self._end_alone(str(error).splitlines()[0])

    def _guard(self) -> None:
        """Ends this process if the store does not answer at all, as that of a dead machine."""
        while not self._leaving.wait(_BEAT) and not self._ended.is_set():
            if time.monotonic() - self._alive > _PATIENCE + _GRACE:
                self._end_alone("it does not answer")

    def _obituary(self, rank: int) -> str:
        host, process, _ = self._names[rank]
        return f"rank {rank} of {self.size} (process {process} on {host}) is gone"

    def _claims(self, store: dist.Store, reason: str) -> str | None:
        """The reason why the run ends, if this process is the one that tells the user."""
        own = f"rank {self.rank}: {reason}"
        try:
            first = store.compare_set(f"{self._key}/ended", "", own) == own.encode()
        except RuntimeError:  # nobody else can be reached
            first = True
        return reason if first else None

    def _end(self, reason: str | None = None) -> None:
        """Ends this process: the main thread is told, and has some time.

        Args:
            reason: to tell the user; None: it has been told.
        """
        if reason is not None:
            _say(f"{reason}: the run ends. What --use_cache has stored, the next one goes on from.")
        self._ended.set()
        if not self._leaving.wait(_GRACE):
            os._exit(1)

    def _end_alone(self, problem: str) -> None:
        """As `_end`, where the store is gone, and with it whoever has it."""
        reason = None
        if not self._ended.is_set() and self.rank == self._hosted:  # one of them speaks
            where = self._obituary(0) if self._hosted else "the launcher is gone"
            reason = f"{where} ({problem})"
        self._end(reason)

    def _fail(self, kind: type[BaseException], error: BaseException, trace: Any) -> None:
        """What Python does with an exception that nobody catches: one process tells of it.

        The others end by themselves meanwhile, before a launcher ends them.
        """
        speaks = kind is not Lost and self._claims(self._store, repr(error)) is not None
        if speaks:
            _say(f"rank {self.rank} of {self.size} fails, and the run ends:")
            self._usual_hook(kind, error, trace)
        self.working = False
        self._leave(lasts=speaks and not self._hosted, fails=True)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(130 if kind is KeyboardInterrupt else 1)

    def _leave(self, lasts: bool = False, fails: bool = False) -> None:
        """Tells that this process has gone by itself. That which has the store goes last.

        Args:
            lasts: whether this one goes last, too.
            fails: whether the process ends at once then, whatever still waits for others.
        """
        if self._leaving.is_set():
            return
        if self.working and not self._ended.is_set():
            reason = f"{self._obituary(self.rank)}, before the others were done"
            if self._claims(self._store, reason) is not None:
                _say(f"{reason}: the run ends")
        self._leaving.set()
        with suppress(RuntimeError):
            for thread in self._threads:
                thread.join(_BEAT)
            self._sign(self._store, -1)
            if lasts or (self._hosted and self.rank == 0):
                self._outlive()
            if not (fails or self._ended.is_set()):
                # NCCL waits until no CUDA graph is left that has captured a collective.
                gc.collect()
                # Threads of gloo's that ask for the interpreter's lock when it ends would abort it.
                dist.destroy_process_group(self._group)
                del self._group

    def _outlive(self) -> None:
        """Until all others have left, or give no more signs of life."""
        others = [rank for rank in range(self.size) if rank != self.rank]
        signs, since = self._signs(self._store, others), time.monotonic()
        deadline = since + _GRACE + _HURRY
        while any(sign >= 0 for sign in signs) and time.monotonic() < deadline:
            time.sleep(0.1)
            now = self._signs(self._store, others)
            if now != signs:
                signs, since = now, time.monotonic()
            elif time.monotonic() - since > _HURRY:
                break


def _say(text: str) -> None:
    print(f"yoco-eval: {text}", file=sys.stderr, flush=True)


def silence_others() -> None:
    """Leaves warnings, logs and progress bars to the first process; errors are still seen."""
    global _silent
    try:
        place = find_place()
    except ValueError:  # which `join` will raise, too
        return
    if _silent or place is None or place.rank == 0:
        return
    _silent = True
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    show = tqdm.__init__

    def hide(bar: tqdm, *args: Any, **options: Any) -> None:
        show(bar, *args, **{**options, "disable": True})

    tqdm.__init__ = hide
