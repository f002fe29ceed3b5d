"What is handed out, and how long it holds"
from dataclasses import replace

import pytest

from cjm_fasthtml_resources.core import host, store
from cjm_fasthtml_resources.core.gpu import GpuDevice
from cjm_fasthtml_resources.core.host import ProcessId
from cjm_fasthtml_resources.core.reservations import WAIT_BUCKETS, Claim, DeviceUse, Ledger, Waits, find_pools, grant, read_use


def on_device(index, free, *rows, claims=(), **fields):
    device = GpuDevice(index, f"GPU-{index}", memory_total=1_000, memory_used=1_000 - free, memory_free=free)
    return DeviceUse(replace(device, **fields), rows)


def test_what_is_handed_out_and_where():
    me, other = ProcessId(1, 1.0), ProcessId(2, 2.0)
    def asked(id, memory, device=None, holder=me, base=0): return Claim(id, holder, memory, ("GPU-0", "GPU-1"), device, base)
    def given(claims, *uses): return [(c.device, c.base) for c in grant(claims, uses, choose=lambda keys: "+".join(keys) if len(keys) > 1 else keys[0])]

    with pytest.raises(KeyError, match="GPU-0\\+GPU-1"): given([asked(1, 10)], on_device(0, 500), on_device(1, 490))   # nearly equal, within one percent: at random
    assert given([asked(1, 10)], on_device(0, 500), on_device(1, 489)) == [("GPU-0", 0)]
    assert given([asked(1, 500)], on_device(0, 500)) == [("GPU-0", 0)] and given([asked(1, 501)], on_device(0, 500)) == [(None, 0)]
    # who waits keeps the device where it may be served first, which is the one with the most room, and no more than that one
    waiting = [asked(1, 600, "GPU-0", other), asked(2, 500, "GPU-1", other), asked(3, 900), asked(4, 100)]
    assert given(waiting, on_device(0, 1_000), on_device(1, 1_000)) == [("GPU-0", 0), ("GPU-1", 0), (None, 0), ("GPU-0", 0)]
    assert given([asked(1, 900, "GPU-0", other), asked(2, 1_000), asked(3, 50)], on_device(0, 1_000)) == [("GPU-0", 0), (None, 0), (None, 0)]
    assert given([asked(1, 900, "GPU-0", other), asked(2, 1_001), asked(3, 50)], on_device(0, 1_000)) == [("GPU-0", 0), (None, 0), ("GPU-0", 0)]   # it will not fit, whoever lets go
    used = on_device(0, 300, ((other,), 700))
    assert given([asked(1, 700, "GPU-0", other), asked(2, 900), asked(3, 50)], used) == [("GPU-0", 0), (None, 0), (None, 0)]    # what the promise is used for comes back, too
    # a new promise counts from what its holder has there and no promise accounts for
    mine = on_device(0, 500, ((me,), 300), ((other, me), 200))
    assert given([asked(1, 100)], mine) == [("GPU-0", 500)]                                        # a child's is the holder's
    assert given([asked(1, 50, "GPU-0", other), asked(2, 100)], mine) == [("GPU-0", 0), ("GPU-0", 300)]   # unless it holds a promise itself
    assert given([asked(1, 200, "GPU-0", me), asked(2, 100)], mine) == [("GPU-0", 0), ("GPU-0", 300)]
    assert given([asked(1, 50, "GPU-1", other), asked(2, 100)], mine, on_device(1, 100)) == [("GPU-1", 0), ("GPU-0", 500)]   # a promise elsewhere makes no difference
    assert given([asked(1, 100)], replace(mine, processes=None)) == [("GPU-0", 500)]               # whose it is cannot be told
    assert given([asked(1, 100, "GPU-0"), asked(2, 100)], replace(mine, processes=None)) == [("GPU-0", 0), ("GPU-0", 400)]
    assert given([asked(1, 100, "GPU-0", base=400)], mine) == [("GPU-0", 400)] and given([asked(1, 100, "GPU-0", base=600)], mine) == [("GPU-0", 500)]   # given back, and not to be given back again


def test_a_device_that_says_nothing_of_its_memory_is_not_counted_on():
    assert read_use([GpuDevice(0, memory_total=0, memory_used=0), GpuDevice(1, memory_total=10), GpuDevice(2, memory_total=10, memory_used=1, mig_mode=True)]) == []
    silent = DeviceUse(GpuDevice(0, "GPU-0"), None)
    assert find_pools(silent, [Claim(1, ProcessId(1, 1.0), 10, ("GPU-0",), "GPU-0")])[None].used == 0 and [c.device for c in grant([Claim(1, ProcessId(1, 1.0), 1, ("GPU-0",))], [silent])] == [None]


def test_who_waits_looks_again_when_the_last_look_is_old(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("cjm_fasthtml_resources.core.reservations.time.monotonic", lambda: now[0])
    ledger = Ledger(store.Store())
    ledger.settle(list)
    assert not ledger.is_due()
    now[0] += 0.25
    assert ledger.is_due() and not ledger.is_due()   # for one of those who ask
    now[0] += 0.24
    assert not ledger.is_due()


def test_a_promise_is_renewed_from_now_on_or_for_good(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("cjm_fasthtml_resources.core.reservations.time.monotonic", lambda: now[0])
    ledger = Ledger(store.Store())
    use = DeviceUse(GpuDevice(0, "GPU-a", memory_total=100, memory_used=0, memory_free=100), ())
    ask = lambda: Claim(0, host.this_process(), 10, ("GPU-a",), ttl=5)   # noqa: E731
    claim = ledger.settle(lambda: [use], ask)[-1]
    assert (claim.device, claim.expires, ledger.find(claim.id)) == ("GPU-a", 1005.0, claim)
    now[0] = 1004.0
    assert ledger.renew(claim.id, 10) and (ledger.find(claim.id).ttl, ledger.find(claim.id).expires) == (10, 1014.0)
    now[0] = 1013.9
    assert [c.id for c in ledger.claims()] == [claim.id]
    now[0] = 1014.0
    assert ledger.claims() == [] and not ledger.renew(claim.id, 10) and not ledger.renew(claim.id, None)   # too late
    second = ledger.settle(lambda: [use], ask)[-1]
    assert ledger.renew(second.id, None) and (ledger.find(second.id).ttl, ledger.find(second.id).expires) == (None, None)
    now[0] += 1e6
    assert [c.id for c in ledger.claims()] == [second.id] and ledger.renew(second.id, 1)
    assert ledger.withdraw(second.id) and not ledger.withdraw(second.id) and ledger.claims() == []


def test_waits_are_counted_in_the_bucket_that_holds_them():
    waits = Waits()
    for seconds in (0.1, 0.11, 0.5, 5, 1e6): waits.observe(seconds)
    buckets, total = waits.read()
    assert [n for _, n in buckets] == [1, 3, 4, 4, 4, 4, 4, 4, 5] and [le for le, _ in buckets] == list(WAIT_BUCKETS) and total == 1_000_005.71
