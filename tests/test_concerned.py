"A request is settled with the claims that concern it alone, and the answer is that of all claims"
import random
from dataclasses import replace

import pytest

from cjm_fasthtml_resources.core.caps import Cap
from cjm_fasthtml_resources.core.claims import RAM, Claim, DeviceUse, grant
from cjm_fasthtml_resources.core.concerned import find_concerned
from cjm_fasthtml_resources.core.endings import find_ending
from cjm_fasthtml_resources.core.gpu import GpuDevice
from cjm_fasthtml_resources.core.host import this_process
from cjm_fasthtml_resources.core.leases import new_lease
from cjm_fasthtml_resources.core.ledger import HiddenClaims, Ledger
from cjm_fasthtml_resources.core.passing import passing_rule
from cjm_fasthtml_resources.core.process import ProcessId
from cjm_fasthtml_resources.core.receipts import Receipt
from cjm_fasthtml_resources.core.store import Store, StoreError

TOTAL = 100
HOLDERS = [ProcessId(4_000_000 + n, 1.0) for n in range(4)]


def device(index, used=0, *rows):
    gpu = GpuDevice(index, f"GPU-{index}", memory_total=TOTAL, memory_used=used, memory_free=TOTAL - used)
    return DeviceUse(gpu, rows)


def some_uses(draw):
    "Five GPUs, partly in use, and RAM"
    uses = []
    for index in range(5):
        rows = tuple(((holder,), draw.randrange(20)) for holder in HOLDERS if draw.random() < 0.3)
        uses.append(device(index, min(sum(size for _, size in rows) + draw.randrange(20), TOTAL), *rows))
    ram = GpuDevice(-1, RAM, "RAM", TOTAL, 20, TOTAL - 20)
    return [replace(use, whole=draw.random() < 0.8) for use in uses] + [DeviceUse(ram, ())]


def some_claim(draw, id, waits):
    keys = draw.sample([f"GPU-{n}" for n in range(5)], draw.choice([1, 1, 1, 2, 3]))
    limit, least = draw.choice([None, 5.0]), draw.choice([None, 60.0])
    receipt = Receipt(user=draw.randrange(2), limit=limit, since=0.0, least=least)
    claim = Claim(id, draw.choice(HOLDERS), draw.randrange(1, 60), tuple(keys), app=draw.choice("ab"), lease=id,
                  ttl=5.0 if receipt.limit else None, receipt=receipt)
    if not waits:
        where = RAM if draw.random() < 0.15 else keys[0]
        return replace(claim, memory=draw.randrange(1, 30), device=where, base=draw.randrange(10))
    beside = ((RAM, draw.randrange(1, 40)),) if draw.random() < 0.15 else ()
    return replace(claim, count=draw.randrange(1, len(keys) + 1), beside=beside, priority=draw.randrange(-3, 4),
                   share=0.9 if draw.random() < 0.1 else 0)


def the_first(options): return min(options, key=str)


@pytest.mark.parametrize("seed", range(600))
def test_what_is_granted_is_the_same_with_those_that_are_concerned_alone(seed):
    draw = random.Random(seed)
    uses = some_uses(draw)
    count = draw.randrange(1, 12)
    claims = [some_claim(draw, 10*n, waits=draw.random() < 0.6) for n in range(1, count + 1)]
    for n, claim in enumerate(claims[1:], 1):   # some are of one lease, as those of a group
        if claim.device and draw.random() < 0.1: claims[n] = replace(claim, lease=claims[n - 1].lease)
    asked = some_claim(draw, 10*(count + 1), waits=True)
    cap = Cap(draw.choice([0.4, 1.0]), draw.choice(["user", "app"]))
    rules = dict(choose=the_first, may_have=cap.allows, may_pass=passing_rule(0.0, cap.allows))
    part = find_concerned(asked, claims, uses)
    ids = {c.id for c in part} | {asked.id}
    every = grant([*claims, asked], uses, **rules)
    mine = grant([*part, asked], uses, **rules)
    assert mine == [c for c in every if c.id//10*10 in ids]
    # and the others get what they would get without it
    others = [c for c in claims if c.id not in ids]
    assert grant(others, uses, **rules) == [c for c in every if c.id//10*10 not in ids]


def test_in_most_queues_some_are_concerned_and_some_are_not():
    "Else the test above would compare the same with the same"
    parts = []
    for seed in range(600):
        draw = random.Random(seed)
        uses, count = some_uses(draw), draw.randrange(1, 12)
        claims = [some_claim(draw, 10*n, waits=draw.random() < 0.6) for n in range(1, count + 1)]
        asked = some_claim(draw, 10*(count + 1), waits=True)
        parts.append(0 < len(find_concerned(asked, claims, uses)) < len(claims))
    assert sum(parts) > 150


@pytest.fixture(params=["private", "shared"])
def ledgers(request, tmp_path):
    "Two ledgers of one file, as in two processes"
    folder = tmp_path/"state"
    folder.mkdir(mode=0o700)
    if request.param == "shared": folder.chmod(0o2770)
    stores = [Store(folder/"resources.sqlite") for _ in range(2)]
    for store in stores: store.prepare()
    return [*map(Ledger, stores)]


def look(): return [device(0), device(1)]


def ask(ledger, memory, index, look=look):
    claim = Claim(0, this_process(), memory, (f"GPU-{index}",), lease=new_lease())
    return next(c for c in ledger.settle(look, lambda: claim) if c.lease == claim.lease)


def test_a_request_leaves_alone_what_does_not_concern_it_and_deletes_what_does(ledgers):
    ledger, other = ledgers
    near, far, behind = ask(other, 60, 0), ask(other, 60, 1), ask(other, 60, 1)
    for claim in (near, far, behind): other.withdraw(claim.lease)
    mine = ask(ledger, 90, 0)
    assert mine.device == "GPU-0"
    assert [c.id for c in ledger.rows().claims] == [far.id, behind.id, mine.id]
    assert [c.id for c in ledger.claims()] == [mine.id]
    ledger.settle(look)   # as a request that waits does
    assert [c.id for c in ledger.rows().claims] == [mine.id]


def test_what_ends_while_the_devices_are_read_counts_as_alive_for_a_request_that_is_granted(ledgers):
    ledger, other = ledgers
    held = ask(other, 60, 0)
    looks = []

    def look_meanwhile():
        looks.append(other.withdraw(held.lease))
        return look()

    fits = ask(ledger, 40, 0, look_meanwhile)
    assert (fits.device, looks) == ("GPU-0", [True])
    assert [c.id for c in ledger.rows().claims] == [held.id, fits.id]   # it is deleted by the next
    held = ask(other, 60, 0)
    looks.clear()
    fits = ask(ledger, 60, 0, look_meanwhile)   # by the first reading it does not fit
    assert (fits.device, looks) == ("GPU-0", [True, False])


@pytest.mark.parametrize("asked_on", [0, 1])
def test_what_was_released_is_not_said_to_be_given_back_unused(ledgers, asked_on, caplog):
    ledger, other = ledgers
    claim = Claim(0, this_process(), 60, ("GPU-0",), lease=new_lease(), for_other=True)
    held = other.settle(look, lambda: claim)[-1]

    def look_meanwhile():
        other.give_back(held.lease, for_other=True)   # which is written
        return look()

    assert ask(ledger, 10, asked_on, look_meanwhile).device == f"GPU-{asked_on}"
    assert [(c.id, c.expires) for c in ledger.rows().claims] == [(held.id, 0.0), (held.id + 1, None)]
    assert find_ending(ledger, held.lease) is None and not caplog.messages


def test_a_reservation_given_while_the_devices_are_read_counts(ledgers):
    ledger, other = ledgers
    looks = []

    def look_meanwhile():
        if not looks: ask(other, 60, 0)
        looks.append(1)
        return look()

    assert (ask(ledger, 60, 0, look_meanwhile).device, len(looks)) == (None, 2)


def test_a_request_that_could_not_be_written_hides_nothing_once_it_is_withdrawn(ledgers, monkeypatch):
    ledger, other = ledgers
    claim = Claim(0, this_process(), 10, ("GPU-0",), lease=new_lease())

    def full(*args): raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("cjm_fasthtml_resources.core.store.write_ledger", full)
        with pytest.raises(StoreError): ledger.settle(look, lambda: claim)
    ledger.withdraw(claim.lease)
    assert other.claims() == [] and ask(other, 20, 0).device == "GPU-0"


def test_a_lease_whose_claim_ran_out_can_ask_again(ledgers):
    ledger, other = ledgers
    lease = new_lease()
    for ttl in (1e-9, None):
        claim = Claim(0, this_process(), 60, ("GPU-0",), ttl=ttl, lease=lease)
        assert ledger.settle(look, lambda claim=claim: claim)[-1].device == "GPU-0"
    assert [c.id for c in other.claims()] == [2] and ledger.rows().ended == ((lease, 1),)
    assert ledger.withdraw(lease) and other.claims() == []
    assert ask(other, 90, 0).device == "GPU-0" and ledger.rows().ended == ()


@pytest.mark.parametrize("asked_on", [0, 1])
def test_a_claim_that_is_missing_is_missed_by_a_request_for_another_device(ledgers, asked_on):
    ledger, other = ledgers
    empty = ledger.store.lock_path.read_bytes()
    held = ask(other, 60, 0)
    with open(ledger.store.lock_path, "r+b") as file: file.write(empty)
    with pytest.raises(HiddenClaims): ask(ledger, 10, asked_on)
    other.withdraw(held.lease)
    assert ask(ledger, 10, asked_on).device == f"GPU-{asked_on}"
