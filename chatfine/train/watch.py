"""A process that dies or hangs ends the whole run at once, by name, instead of leaving the others
to wait half an hour for it.

Every process says twice a second, from a thread of its own, that it lives, how far it has come
and where its main thread is; and reads the same of the others. The words travel through a store
(torch's TCPStore) that the launcher or the first process keeps.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from chatfine import console
from chatfine.errors import Stopped
from chatfine.i18n import t

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

BEAT_SECONDS = 0.5
SILENT_SECONDS = 8.0
"""In a training step a process that says nothing for so long is lost. Its thread only needs the
interpreter for a moment, and torch lets go of it while it computes."""
SILENT_SETUP_SECONDS = 60.0
"""Outside of steps: reading a large JSON file holds the interpreter for long."""
STALLED_SECONDS = 8.0
STALLED_TIMES = 5.0
"""A process hangs when it is not waiting for another and has been at one micro-batch for so long,
and for so many times the longest one until now."""
DEPTH = 12  # frames of the main thread that are told


@dataclass(slots=True)
class Beat:
    """What a process says of itself."""

    pid: int
    host: str
    number: int = 0  # of this word
    ticks: int = 0  # micro-batches done
    longest: float = 0.0  # seconds of the longest micro-batch
    in_step: bool = False
    waiting: bool = False  # for other processes
    place: str = ""  # where its main thread is
    failed: str = ""  # why it ended by itself
    done: bool = False


@dataclass(slots=True)
class _Seen:
    """The last word of another process, when it came, and when it last got on."""

    beat: Beat
    heard: float
    moved: float = field(default=0.0)


class Watch:
    """The thread of one process that speaks and listens."""

    def __init__(self, store: TCPStore, prefix: str, rank: int, size: int) -> None:
        self._store, self._prefix = store, prefix
        self.rank, self.size = rank, size
        self.beat = Beat(os.getpid(), socket.gethostname())
        self._seen: dict[int, _Seen] = {}
        self._main = threading.get_ident()  # Ray Train trains in a thread of its own
        self._ticked = time.monotonic()
        self._end = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True, name="chatfine-watch")

    @classmethod
    def start(cls, rank: int, size: int) -> Watch | None:
        """Begin to watch; None where the store can't be reached (then torch's timeouts remain)."""
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        try:
            store = TCPStore(
                os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                timeout=timedelta(seconds=60), wait_for_workers=False,
            )  # fmt: skip
        except (KeyError, ValueError, RuntimeError):
            return None
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        watch = cls(store, f"chatfine/{restarts}", rank, size)
        watch._speak()
        store.wait([watch._key(other) for other in range(size)])
        watch._thread.start()
        return watch

    # -- what the run tells ------------------------------------------------------------------------

    def tick(self) -> None:
        """A micro-batch is done."""
        now = time.monotonic()
        if self.beat.ticks:
            self.beat.longest = max(self.beat.longest, now - self._ticked)
        self._ticked = now
        self.beat.ticks += 1

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """The training steps, in which every process must get on."""
        self._ticked, self.beat.in_step = time.monotonic(), True
        try:
            yield
        finally:
            self.beat.in_step = False

    def fail(self, text: str) -> None:
        """Tell the others why this process ends."""
        self.beat.failed = text or "?"
        self.close()

    def close(self) -> None:
        """The last word; from now on nobody misses this process."""
        if not self._end.is_set():
            self._end.set()
            self.beat.done = True
            with contextlib.suppress(RuntimeError, ValueError):
                self._speak()

    # -- the thread --------------------------------------------------------------------------------

    def _key(self, rank: int) -> str:
        return f"{self._prefix}/{rank}"

    def _speak(self) -> None:
        with self._lock:
            self.beat.number += 1
            self._store.set(self._key(self.rank), json.dumps(asdict(self.beat)))

    def _run(self) -> None:
        others = [rank for rank in range(self.size) if rank != self.rank]
        keys = [self._key(rank) for rank in others]
        while not self._end.wait(BEAT_SECONDS):
            self.beat.place, self.beat.waiting = _where(self._main)
            try:
                self._speak()
                words = self._store.multi_get(keys)
            except (RuntimeError, ValueError):  # torch's DistError among them
                if not self._end.is_set():
                    self._give_up(t("the process that keeps the run together is gone"), None)
                return
            for rank, word in zip(others, words, strict=True):
                self._hear(rank, Beat(**json.loads(word)))
            for rank, seen in self._seen.items():
                fault = self._fault(seen)
                if fault:
                    self._give_up(self._named(rank, seen.beat, fault), seen.beat)
                    return

    def _hear(self, rank: int, beat: Beat) -> None:
        now = time.monotonic()
        seen = self._seen.setdefault(rank, _Seen(beat, now, now))
        if beat.number != seen.beat.number:
            seen.heard = now
        if beat.ticks != seen.beat.ticks or not beat.in_step:
            seen.moved = now
        seen.beat = beat

    def _fault(self, seen: _Seen) -> str | None:
        """What is wrong with another process, if anything."""
        beat, now = seen.beat, time.monotonic()
        if beat.failed:
            return t("ended: {reason}", reason=beat.failed)
        if beat.done:
            return None
        silent = now - seen.heard
        limit = SILENT_SECONDS if beat.in_step else SILENT_SETUP_SECONDS
        if silent > 4 * BEAT_SECONDS and beat.host == self.beat.host:
            state = _state(beat.pid)
            if state:
                return state
        if silent > limit:
            return t("has said nothing for {n:.0f} seconds", n=silent)
        longest = max(self.beat.longest, *(one.beat.longest for one in self._seen.values()))
        allowed = max(STALLED_SECONDS, STALLED_TIMES * longest)
        started = beat.ticks > 1 and beat.in_step and not beat.waiting
        if started and now - seen.moved > allowed:
            return t("hangs, {n:.0f} seconds now, in {place}", n=now - seen.moved,
                     place=beat.place)  # fmt: skip
        return None

    def _named(self, rank: int, beat: Beat, fault: str) -> str:
        return t("process {rank} of {size} (pid {pid} on {host}) {fault}", rank=rank,
                 size=self.size, pid=beat.pid, host=beat.host, fault=fault)  # fmt: skip

    def _give_up(self, what: str, culprit: Beat | None) -> None:
        """Say which process it was and end this one, whose main thread may wait for ever."""
        error = Stopped(
            "process-lost", what,
            why=t("the others can't go on without it, so all of them end now"),
            fix=t("find out why, then go on from the last checkpoint: chatfine resume RUN"),
        )  # fmt: skip
        # the first process says itself why it fails; else the first one that is left says it
        told = bool(culprit and culprit.failed and self.rank and self._seen[0].beat is culprit)
        speaker = next(rank for rank in range(self.size)
                       if rank == self.rank or self._seen[rank].beat is not culprit)  # fmt: skip
        if speaker == self.rank and not told:
            console.error(error.code, str(error))
        if culprit and not culprit.done and culprit.host == self.beat.host:
            with contextlib.suppress(OSError):  # a stopped process does not hear the launcher
                os.kill(culprit.pid, getattr(signal, "SIGKILL", signal.SIGTERM))
        sys.stderr.flush()
        os._exit(error.exit_code)


def _state(pid: int) -> str | None:
    """What became of a process of this machine; None if it runs."""
    import psutil

    try:
        status = psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return t("died")
    except psutil.Error:
        return None
    if status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
        return t("died")
    return t("was stopped") if status == psutil.STATUS_STOPPED else None


def _where(thread: int | None) -> tuple[str, bool]:
    """Where a thread is (`file:line function`), and whether it waits for other processes there."""
    frame: Any = sys._current_frames().get(thread or 0)
    place, waiting = "", False
    for _ in range(DEPTH):
        if frame is None:
            break
        file = frame.f_code.co_filename.replace("\\", "/")
        place = place or f"{'/'.join(file.split('/')[-2:])}:{frame.f_lineno} {frame.f_code.co_name}"
        waiting = waiting or "torch/distributed/" in file or file.endswith("train/distributed.py")
        frame = frame.f_back
    return place, waiting
