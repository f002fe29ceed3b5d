"""A request that passes others delays none of them: queues of Hypothesis are played through, with and without passing.
Holders keep their memory at least as long as the shortest job of their kind, less a quarter, and a job with a declared
time ends by then"""
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from cjm_fasthtml_resources.core.claims import Claim, DeviceUse, grant, passes_none
from cjm_fasthtml_resources.core.gpu import GpuDevice
from cjm_fasthtml_resources.core.passing import SURE, passing_rule
from cjm_fasthtml_resources.core.process import ProcessId
from cjm_fasthtml_resources.core.receipts import new_receipt

TOTAL = 24
DEVICE = DeviceUse(GpuDevice(0, "GPU-0", memory_total=TOTAL, memory_used=0, memory_free=TOTAL), ())
SECONDS = st.integers(1, 60).map(float)
LEAST = st.none() | st.integers(4, 200).map(float)
JOBS = st.fixed_dictionaries(dict(memory=st.integers(1, TOTAL), least=LEAST, limit=st.none() | SECONDS, takes=SECONDS,
                                  priority=st.integers(-1, 1)))


def queue_of(jobs: list[dict]) -> tuple[list[Claim], dict[int, float]]:
    "Requests in the order of asking, and how long each truly takes: within its limit, and no shorter than is known"
    claims, takes = [], {}
    for id, job in enumerate(jobs, 1):
        limit, least = job["limit"], job["least"]
        if limit is not None and least is not None: least = min(least, limit)
        receipt = new_receipt(limit=limit, lasts=None if least is None else (least, 2*least))
        claims.append(Claim(id, ProcessId(40 + id, 1.0), job["memory"], ("GPU-0",), ttl=limit, receipt=receipt,
                            priority=job["priority"]))
        takes[id] = max(job["takes"], SURE*(least or 0.0))
        if limit is not None: takes[id] = min(takes[id], limit)
    return claims, takes


def starts_of(claims: list[Claim], takes: dict[int, float], rule=passing_rule) -> tuple[dict[int, float], set[int]]:
    "When each request starts, and those that passed others"
    now, ends, starts, passed = 0.0, {}, {}, set()
    while claims:
        found = grant(claims, [DEVICE], lambda keys: keys[0], may_pass=rule(now))
        assert sum(c.memory for c in found if c.device) <= TOTAL
        for n, c in enumerate(found):
            if c.device is None or c.id in starts: continue
            starts[c.id], ends[c.id] = now, now + takes[c.id]
            if c.receipt.passed is not None: passed.add(c.id)
            found[n] = replace(c, receipt=c.receipt._replace(since=now))
        if sum(c.device is None for c in found) == sum(c.device is None for c in claims):   # else the queue looks again
            now = min(ends[c.id] for c in found if c.device)
        claims = [c for c in found if c.device is None or ends[c.id] > now]
    return starts, passed


def never(now: float): return passes_none


def always(now: float): return lambda claim, ahead, claims, uses: True


@given(st.lists(JOBS, min_size=2, max_size=8))
def test_who_passes_delays_no_other_request(jobs):
    claims, takes = queue_of(jobs)
    (with_it, _), (without, _) = starts_of(claims, takes), starts_of(claims, takes, never)
    assert set(with_it) == set(without) == {c.id for c in claims}
    assert all(with_it[id] <= without[id] for id in without)


def test_some_pass_and_a_rule_that_lets_all_pass_would_delay_others():
    jobs = [dict(memory=16, least=100.0, limit=None, takes=80.0, priority=0),
            dict(memory=20, least=None, limit=None, takes=10.0, priority=0),
            dict(memory=8, least=None, limit=60.0, takes=60.0, priority=0),
            dict(memory=8, least=None, limit=90.0, takes=90.0, priority=0)]
    claims, takes = queue_of(jobs)
    starts, passed = starts_of(claims, takes)
    assert passed == {3} and starts == {1: 0.0, 3: 0.0, 2: 80.0, 4: 90.0}
    late = starts_of([c for c in claims if c.id != 3], takes, always)[0]
    assert late[2] == 90.0 > starts_of(claims, takes, never)[0][2] == 80.0
