"""What a process tells of itself, and who ends torch's group, when it trains in a thread of its own
beside another program's main thread (Ray Train)."""

from __future__ import annotations

import json
import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from chatfine.train.distributed import Group
from chatfine.train.watch import Watch


def training_thread(end: threading.Event) -> None:
    while not end.is_set():
        time.sleep(0.01)


def test_the_place_told_is_that_of_the_thread_that_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=30))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    end, started = threading.Event(), threading.Event()
    watches: list[Watch | None] = []

    def work() -> None:
        watches.append(Watch.start(0, 1))
        started.set()
        training_thread(end)

    thread = threading.Thread(target=work)
    thread.start()
    assert started.wait(30)
    (watch,) = watches
    assert watch is not None
    try:
        told, deadline = "", time.monotonic() + 10
        while "training_thread" not in told and time.monotonic() < deadline:
            told = json.loads(store.get("chatfine/0/0"))["place"]
            time.sleep(0.05)
        assert "training_thread" in told
    finally:
        end.set()
        watch.close()
        thread.join()


def test_only_who_made_the_group_ends_it() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        Group(0, 2, ours=False).leave()
        assert dist.is_initialized()
        Group(0, 2, ours=True).leave()
        assert not dist.is_initialized()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
