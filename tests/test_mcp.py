"`cjm-resources mcp` over standard input and output, with the protocol's own client and a simulated driver"
import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from servers import wait_until

from cjm_fasthtml_resources.core.endings import end_claim
from cjm_fasthtml_resources.core.ledger import Ledger
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.store import Store, store_path
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu

if find_spec("mcp") is None: pytest.skip("no mcp: pip install '.[mcp]'", allow_module_level=True)

from mcp import Client, StdioServerParameters, stdio_client

from cjm_fasthtml_resources.agents.foresee import foresee
from cjm_fasthtml_resources.agents.held import OwnReservations
from cjm_fasthtml_resources.agents.server import call_tool

COMMAND = ["-m", "cjm_fasthtml_resources", "--simulate", "pair", "mcp"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CJM_RESOURCES_DIR", str(tmp_path))
    return tmp_path


def claims() -> list[int]:
    "The IDs in the queue, as any other process reads them"
    return [claim.id for claim in Ledger(Store(store_path())).claims()]


def holders() -> dict[int, int]:
    "The PID of each one's process, by ID"
    return {claim.id: claim.holder.pid for claim in Ledger(Store(store_path())).claims()}


def server(folder: Path, *options: str):
    env = {"CJM_RESOURCES_DIR": str(folder), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    parameters = StdioServerParameters(command=sys.executable, args=[*COMMAND, *options], env=env)
    return Client(stdio_client(parameters))


def text(answer) -> str: return answer.content[0].text


async def the_tools_say_what_they_change(client):
    tools = {tool.name: tool for tool in (await client.list_tools()).tools}
    assert list(tools) == ["check", "who_holds", "why_blocked", "preview", "queue", "reserve", "hand_over",
                           "release"]
    for name, tool in tools.items():
        changes = name in ("reserve", "hand_over", "release")
        assert tool.annotations.read_only_hint is not changes and ("CHANGES" in tool.description) is changes
    assert tools["reserve"].input_schema["required"] == ["ttl"] and tools["release"].annotations.destructive_hint


async def what_reads_changes_nothing(client):
    for name, given in (("check", {}), ("who_holds", {}), ("preview", dict(gpu_memory_mb=4000)),
                        ("why_blocked", dict(gpu_memory_mb=40_000)), ("queue", {})):
        answer = await client.call_tool(name, given)
        assert not answer.is_error and text(answer) and answer.structured_content, name
        assert json.loads(json.dumps(answer.structured_content)) == answer.structured_content
    assert claims() == []


async def a_reservation_needs_a_ttl_and_is_given_back(client):
    async def call(name, **given): return await client.call_tool(name, given)
    refused = await call("reserve", gpu_memory_mb=4000)
    assert refused.is_error and text(refused).startswith("reserve needs ttl: seconds after which"), text(refused)
    too_long = await call("reserve", gpu_memory_mb=4000, ttl=1e6)
    assert too_long.is_error and "ttl must be between 1 and 3600" in text(too_long), text(too_long)
    seen = await call("preview", gpu_memory_mb=4000)
    held = await call("reserve", gpu_memory_mb=4000, ttl=600)
    assert not held.is_error and held.structured_content["gpus"] == seen.structured_content["gpus"]
    id = held.structured_content["id"]
    assert claims() == [id] and held.structured_content["env"]["CUDA_VISIBLE_DEVICES"] in text(held)
    busy = await call("reserve", gpu_memory_mb=40_000, ttl=600)
    assert busy.is_error and "The job did not wait: timeout is 0" in text(busy) and busy.structured_content["gpus"]
    other = await call("release", id=id + 100)
    assert other.is_error and f"The agent has: {id}." in text(other)
    assert text(await call("release", id=id)) == f"Released reservation {id}." and claims() == []


async def a_reservation_runs_out(client):
    held = await client.call_tool("reserve", dict(gpu_memory_mb=4000, ttl=1))
    await asyncio.to_thread(wait_until, lambda: claims() == [])
    over = await client.call_tool("release", dict(id=held.structured_content["id"]))
    assert "had already ended: its ttl had run out" in text(over)


async def a_reservation_goes_to_the_program_that_the_agent_started(client):
    async def call(name, **given): return await client.call_tool(name, given)
    held = (await call("reserve", gpu_memory_mb=4000, ttl=600)).structured_content
    with subprocess.Popen(["sleep", "100"]) as program:
        try:
            for pid, said in ((2**22 + 1, "must be that of a living process"), ("1", "pid")):
                refused = await call("hand_over", id=held["id"], pid=pid)
                assert refused.is_error and said in text(refused), text(refused)
            assert (await call("hand_over", id=held["id"] + 100, pid=program.pid)).is_error
            assert holders() == {held["id"]: held["pid"]}
            given = await call("hand_over", id=held["id"], pid=program.pid)
            assert not given.is_error and f"belongs to sleep (PID {program.pid})" in text(given), text(given)
            assert holders() == {held["id"]: program.pid}
            limited = await call("hand_over", id=held["id"], pid=os.getpid(), ttl=600)
            assert limited.structured_content == dict(id=held["id"], pid=os.getpid(), ttl=600)
            assert not (await call("hand_over", id=held["id"], pid=program.pid)).is_error
        finally: program.kill()
    await asyncio.to_thread(wait_until, lambda: claims() == [])
    over = await call("hand_over", id=held["id"], pid=os.getpid())
    assert over.is_error and "is over" in text(over), text(over)
    late = await call("release", id=held["id"])
    assert not late.structured_content["was_held"] and "its program had ended" in text(late), text(late)


async def a_reservation_that_somebody_else_released_is_over(client):
    held = await client.call_tool("reserve", dict(gpu_memory_mb=4000, ttl=600))
    id = held.structured_content["id"]
    end_claim(Ledger(Store(store_path())), id)
    over = await client.call_tool("release", dict(id=id))
    assert not over.is_error and f"(PID {os.getpid()}) had released it" in text(over), text(over)


async def a_call_that_waits_holds_up_no_other_call(client):
    await client.call_tool("reserve", dict(gpu_memory_mb=30_000, ttl=600))
    waits = asyncio.create_task(client.call_tool("reserve", dict(gpu_memory_mb=30_000, ttl=600, timeout=60)))
    await asyncio.to_thread(wait_until, lambda: len(claims()) == 2)
    queue = await client.call_tool("queue", {})
    first, second = [row["id"] for row in queue.structured_content["queue"]]
    blocked = await client.call_tool("why_blocked", dict(id=second))
    assert blocked.structured_content["blocked"] and text(blocked).startswith(f"{second} waits: ")
    await client.call_tool("release", dict(id=first))
    assert not (await waits).is_error
    await client.call_tool("release", dict(id=second))


async def a_call_that_is_cancelled_leaves_the_queue(client):
    held = await client.call_tool("reserve", dict(gpu_memory_mb=30_000, ttl=600))
    waits = asyncio.create_task(client.call_tool("reserve", dict(gpu_memory_mb=30_000, ttl=600, timeout=60)))
    await asyncio.to_thread(wait_until, lambda: len(claims()) == 2)
    waits.cancel()
    id = held.structured_content["id"]
    await asyncio.to_thread(wait_until, lambda: claims() == [id])
    await client.call_tool("release", dict(id=id))


def test_a_conversation(folder):
    "All of it with one server, since each takes a second or two to start"
    async def run():
        async with server(folder, "--longest", "1h") as client:
            for talk in (the_tools_say_what_they_change, what_reads_changes_nothing,
                         a_reservation_needs_a_ttl_and_is_given_back, a_reservation_runs_out,
                         a_reservation_goes_to_the_program_that_the_agent_started,
                         a_reservation_that_somebody_else_released_is_over,
                         a_call_that_waits_holds_up_no_other_call, a_call_that_is_cancelled_leaves_the_queue):
                await asyncio.wait_for(talk(client), 60)
    asyncio.run(run())


def test_what_an_agent_reserved_ends_with_its_server(folder):
    "By SIGKILL, and with the conversation; another agent cannot release it before that"
    async def run():
        need = dict(gpu_memory_mb=4000, ttl=600)
        async with server(folder) as client:
            mine = (await client.call_tool("reserve", need)).structured_content
            with contextlib.suppress(Exception):   # its server is killed
                async with server(folder) as other:
                    theirs = (await other.call_tool("reserve", need)).structured_content
                    found.append((mine["id"], theirs["id"], claims()))
                    found.append(text(await other.call_tool("release", dict(id=mine["id"]))))
                    os.kill(theirs["pid"], signal.SIGKILL)
                    await asyncio.to_thread(wait_until, lambda: claims() == [mine["id"]])
            found.append(claims())
    found = []
    asyncio.run(run())
    (mine, theirs, both), refused, left = found
    assert both == [mine, theirs] and left == [mine] and "does not belong to this agent" in refused
    wait_until(lambda: claims() == [])


@pytest.mark.parametrize("killed", [False, True])
def test_what_was_handed_over_outlives_the_server(folder, killed):
    async def run(pid: int) -> int:
        with contextlib.suppress(Exception):   # its server is killed
            async with server(folder) as client:
                held = (await client.call_tool("reserve", dict(gpu_memory_mb=4000, ttl=600))).structured_content
                found.append(held["id"])
                assert not (await client.call_tool("hand_over", dict(id=held["id"], pid=pid))).is_error
                kept = (await client.call_tool("reserve", dict(gpu_memory_mb=4000, ttl=600))).structured_content
                if killed: os.kill(held["pid"], signal.SIGKILL)
                await asyncio.to_thread(wait_until, lambda: not killed or kept["id"] not in claims())
    found = []
    with subprocess.Popen(["sleep", "100"]) as program:
        try:
            asyncio.run(run(program.pid))
            wait_until(lambda: holders() == {found[0]: program.pid}, told=holders)
        finally: program.kill()
    wait_until(lambda: claims() == [])


def test_what_is_foreseen_is_what_happens(folder):
    "With random queues: a preview says yes exactly where the reservation is granted"
    chosen, manager = random.Random(24), ResourceManager(app="agent", track_self=False)
    with SimulatedDriver([SimulatedGpu(name="NVIDIA L4") for _ in range(3)]):
        for _ in range(25):
            queue = [manager.request(chosen.choice([2000, 8000, 20_000]), n=chosen.choice([1, 1, 2, 3]),
                                     priority=chosen.choice([0, -5, 5]), memory_mb=chosen.choice([0, 64]))
                     for _ in range(chosen.randrange(7))]
            for request in queue: request.poll()
            need = dict(gpu_memory_mb=chosen.choice([1000, 12_000, 22_000, "all"]), n=chosen.choice([1, 1, 2, 3]),
                        priority=chosen.choice([0, -20, 19]), memory_mb=chosen.choice([0, 64]))
            seen, request = foresee(manager, **need), manager.request(**need)
            queue.append(request)
            assert (request.poll() is not None) is seen.granted, (need, seen.why)
            for request in queue: request.withdraw()


def test_without_a_gpu_each_tool_says_so(folder):
    own = OwnReservations(ResourceManager(app="agent", track_self=False))
    with SimulatedDriver([]):
        for name, given in (("check", {}), ("who_holds", {}), ("preview", dict(gpu_memory_mb=1)),
                            ("why_blocked", dict(gpu_memory_mb=1)), ("reserve", dict(gpu_memory_mb=1, ttl=60))):
            assert "No GPU can be used" in text(asyncio.run(call_tool(own, name, given))), name


def test_nothing_but_the_protocol_is_written(folder):
    "What is no message is answered or left out; the end of standard input is the end"
    done = subprocess.run([sys.executable, *COMMAND], input="hello\n\n{}\n", capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines(): assert json.loads(line)["jsonrpc"] == "2.0"


def test_ctrl_c_ends_it(folder):
    process = subprocess.Popen([sys.executable, *COMMAND], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        wait_until(lambda: any(folder.glob("*.lock")) or process.poll() is not None)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) in (-signal.SIGINT, 130)
    finally:
        process.kill()
        process.communicate()
