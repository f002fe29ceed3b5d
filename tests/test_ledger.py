"What is handed out, and how long it holds"
from dataclasses import replace
from functools import partial

import pytest
from lines import interrupted_at

from cjm_fasthtml_resources.core import host, store
from cjm_fasthtml_resources.core.claims import Claim, DeviceUse, find_pools, grant, read_use
from cjm_fasthtml_resources.core.gpu import GpuDevice
from cjm_fasthtml_resources.core.leases import hides_any, new_lease
from cjm_fasthtml_resources.core.ledger import WAIT_BUCKETS, Ledger, Waits
from cjm_fasthtml_resources.core.process import ProcessId

ME, OTHER = ProcessId(1, 1.0), ProcessId(2, 2.0)


def on_device(index, free, *rows, **fields):
    device = GpuDevice(index, f"GPU-{index}", memory_total=1_000, memory_used=1_000 - free, memory_free=free)
    return DeviceUse(replace(device, **fields), rows)


def asked(id, memory, device=None, holder=ME, base=0):
    return Claim(id, holder, memory, ("GPU-0", "GPU-1"), device, base)


def given(claims, *uses):
    "Device and base of each claim; a choice between two devices is a KeyError that names them"
    def choose(keys): return "+".join(keys) if len(keys) > 1 else keys[0]
    return [(claim.device, claim.base) for claim in grant(claims, uses, choose=choose)]


def test_the_device_with_the_most_room_is_handed_out():
    half, more, nearly = (on_device(n, free, ((OTHER,), 1_000 - free)) for n, free in ((0, 500), (1, 490), (1, 489)))
    # nearly equal, within one percent: at random
    with pytest.raises(KeyError, match="GPU-0\\+GPU-1"): given([asked(1, 10)], half, more)
    assert given([asked(1, 10)], half, nearly) == [("GPU-0", 0)]
    assert given([asked(1, 500)], half) == [("GPU-0", 0)]
    assert given([asked(1, 501)], half) == [(None, 0)]


def test_an_empty_list_while_memory_is_in_use_is_not_known():
    assert given([asked(1, 10)], on_device(0, 400)) == [("GPU-0", 600)]
    assert given([asked(1, 10)], on_device(0, 1_000)) == [("GPU-0", 0)]
    # what the machine uses is no process's on the GPU
    assert given([asked(1, 10)], on_device(0, 400, unified=True)) == [("GPU-0", 0)]


def test_who_waits_keeps_a_device_where_it_may_be_served_first():
    # that is the one with the most room, and no more than that one
    waiting = [asked(1, 600, "GPU-0", OTHER), asked(2, 500, "GPU-1", OTHER), asked(3, 900), asked(4, 100)]
    assert given(waiting, on_device(0, 1_000), on_device(1, 1_000)) == \
        [("GPU-0", 0), ("GPU-1", 0), (None, 0), ("GPU-0", 0)]
    promised = asked(1, 900, "GPU-0", OTHER)
    assert given([promised, asked(2, 1_000), asked(3, 50)], on_device(0, 1_000)) == \
        [("GPU-0", 0), (None, 0), (None, 0)]
    # it will not fit, whoever lets go
    assert given([promised, asked(2, 1_001), asked(3, 50)], on_device(0, 1_000)) == \
        [("GPU-0", 0), (None, 0), ("GPU-0", 0)]
    # what the promise is used for comes back, too
    used = on_device(0, 300, ((OTHER,), 700))
    assert given([asked(1, 700, "GPU-0", OTHER), asked(2, 900), asked(3, 50)], used) == \
        [("GPU-0", 0), (None, 0), (None, 0)]


def test_a_new_promise_counts_from_what_its_holder_has_there_and_no_promise_accounts_for():
    mine = on_device(0, 500, ((ME,), 300), ((OTHER, ME), 200))
    # a child's is the holder's, unless it holds a promise itself
    assert given([asked(1, 100)], mine) == [("GPU-0", 500)]
    assert given([asked(1, 50, "GPU-0", OTHER), asked(2, 100)], mine) == [("GPU-0", 0), ("GPU-0", 300)]
    assert given([asked(1, 200, "GPU-0", ME), asked(2, 100)], mine) == [("GPU-0", 0), ("GPU-0", 300)]
    # a promise elsewhere makes no difference
    elsewhere = [asked(1, 50, "GPU-1", OTHER), asked(2, 100)]
    assert given(elsewhere, mine, on_device(1, 100)) == [("GPU-1", 0), ("GPU-0", 500)]
    # where it cannot be told whose it is
    untold = replace(mine, processes=None)
    assert given([asked(1, 100)], untold) == [("GPU-0", 500)]
    assert given([asked(1, 100, "GPU-0"), asked(2, 100)], untold) == [("GPU-0", 0), ("GPU-0", 400)]
    # given back, and not to be given back again
    assert given([asked(1, 100, "GPU-0", base=400)], mine) == [("GPU-0", 400)]
    assert given([asked(1, 100, "GPU-0", base=600)], mine) == [("GPU-0", 500)]


def test_a_device_that_says_nothing_of_its_memory_is_not_counted_on():
    assert read_use([
        GpuDevice(0, memory_total=0, memory_used=0),
        GpuDevice(1, memory_total=10),
        GpuDevice(2, memory_total=10, memory_used=1, mig_mode=True),
    ]) == []
    silent = DeviceUse(GpuDevice(0, "GPU-0"), None)
    assert find_pools(silent, [Claim(1, ME, 10, ("GPU-0",), "GPU-0")])[ME].used == 0
    assert [claim.device for claim in grant([Claim(1, ME, 1, ("GPU-0",))], [silent])] == [None]


@pytest.fixture(params=["memory", "file"])
def ledgers(request, tmp_path, monkeypatch):
    "Two ledgers of one store, whose leases are one process's in memory and two processes' in a file; and the clock"
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    shared = store.Store()
    paths = [tmp_path/"state"/"resources.sqlite"]*2
    stores = [shared]*2 if request.param == "memory" else [store.Store(path) for path in paths]
    for one in stores: one.prepare()
    return *map(Ledger, stores), now


def test_who_waits_looks_again_when_the_last_look_is_old(ledgers):
    ledger, other, now = ledgers
    ledger.settle(list, lambda: Claim(0, host.this_process(), 10, (), lease=new_lease()))
    assert ledger.take_turn() and not ledger.take_turn() and not other.take_turn()   # for one of those who ask
    now[0] += 0.24
    assert not ledger.take_turn() and not other.take_turn()
    now[0] += 0.01
    assert other.take_turn() and not ledger.take_turn() and not other.take_turn()
    now[0] += 0.24
    assert not ledger.take_turn() and not other.take_turn()
    now[0] = 1.0   # as after a restart of the machine: the last look is not of this clock
    assert ledger.take_turn() and not other.take_turn()


def test_who_gives_back_lets_one_who_waits_look_at_once(ledgers):
    ledger, other, _ = ledgers
    lease = new_lease()
    ledger.settle(list, lambda: Claim(0, host.this_process(), 10, (), lease=lease))
    assert other.take_turn() and not other.take_turn()
    assert ledger.withdraw(lease)
    assert other.take_turn() and not other.take_turn() and not ledger.take_turn()


def test_a_promise_is_renewed_from_now_on_or_for_good(ledgers):
    ledger, other, now = ledgers
    use = DeviceUse(GpuDevice(0, "GPU-a", memory_total=100, memory_used=0, memory_free=100), ())
    def ask(lease): return lambda: Claim(0, host.this_process(), 10, ("GPU-a",), ttl=5, lease=lease)
    def given(lease):
        claim = ledger.settle(lambda: [use], ask(lease))[-1]
        ledger.note_deadline(lease, claim.expires)
        return claim
    def seen(): return [[c.lease for c in one.claims()] for one in (ledger, other)]
    first, second = new_lease(), new_lease()
    claim = given(first)
    assert (claim.device, claim.expires) == ("GPU-a", 1005.0) and ledger.find(first) == other.find(first)
    assert vars(ledger.find(first)) | {"space": None} == vars(claim) | {"space": None}
    now[0] = 1004.0
    assert ledger.renew(first, 10)
    assert (other.find(first).ttl, other.find(first).expires) == (10, 1014.0)
    now[0] = 1013.9
    assert seen() == [[first], [first]]
    now[0] = 1014.0
    assert seen() == [[], []] and other.find(first).expires == 1014.0   # what is written stays until the next look
    assert not ledger.renew(first, 10) and not ledger.renew(first, None)   # too late
    assert not ledger.withdraw(first) and other.find(first).expires == 1014.0
    given(second)
    assert other.find(first) is None and [c.lease for c in other.rows().claims] == [second]
    assert ledger.renew(second, None)
    assert (other.find(second).ttl, other.find(second).expires) == (None, None)
    now[0] += 1e6
    assert seen() == [[second], [second]] and ledger.renew(second, 1)
    before = other.rows()
    assert ledger.withdraw(second) and not ledger.withdraw(second) and seen() == [[], []]
    assert not ledger.renew(second, 1) and other.rows() == before   # a release needs no writing


def test_a_promise_is_renewed_and_taken_back_by_the_process_that_has_it_alone(tmp_path):
    ledger, other = (Ledger(store.Store(tmp_path/"state"/"resources.sqlite")) for _ in range(2))
    ledger.store.prepare()
    lease = new_lease()
    ledger.settle(list, lambda: Claim(0, host.this_process(), 10, (), ttl=5, lease=lease))
    before = ledger.rows()
    assert not other.renew(lease, 10) and not other.withdraw(lease)
    assert other.rows() == before and [c.lease for c in other.claims()] == [lease]
    assert ledger.withdraw(lease) and other.claims() == []


def test_waits_are_counted_in_the_bucket_that_holds_them():
    waits = Waits()
    for seconds in (0.1, 0.11, 0.5, 5, 1e6): waits.observe(seconds)
    buckets, total = waits.read()
    assert [count for _, count in buckets] == [1, 3, 4, 4, 4, 4, 4, 4, 5]
    assert [limit for limit, _ in buckets] == list(WAIT_BUCKETS) and total == 1_000_005.71


FILES = "core/ledger.py", "core/leases.py", "core/store.py", "core/lockfile.py", "core/locking.py"


@pytest.mark.parametrize("part", range(4))
def test_an_interruption_while_a_request_is_entered_leaves_a_mark_exactly_where_there_is_a_claim(tmp_path, part):
    ledger, other = (Ledger(store.Store(tmp_path/"state"/"resources.sqlite")) for _ in range(2))
    ledger.store.prepare()
    theirs = new_lease()
    def enter(one, lease): one.settle(list, lambda: Claim(0, host.this_process(), 10, (), lease=lease))
    enter(other, theirs)   # so that this ledger was read and written before
    number, found = part, set()
    lease = new_lease()
    while interrupted_at(number, FILES, partial(enter, ledger, lease)):
        rest = [c.id for c in other.rows().claims if c.lease != lease]
        is_in = [c.lease for c in other.claims()].count(lease)
        assert hides_any(ledger.store.lock_path, rest) == bool(is_in), number
        found.add(is_in)
        enter(other, more := new_lease())   # with the id that may have been planned for the first
        enter(ledger, lease)                # as a program that polls again
        assert [c.lease for c in other.claims()] == [theirs, *([lease, more] if is_in else [more, lease])], number
        rest = [c.id for c in other.rows().claims if c.lease != lease]
        assert hides_any(ledger.store.lock_path, rest), number
        assert ledger.withdraw(lease) and other.withdraw(more)
        other.settle(list)                  # which deletes them
        number, lease = number + 4, new_lease()
    assert found == {0, 1} and number > 200
