"""A request that asks the idle holders of other apps to unload, with real processes, on the page and in the panel"""
import os
import re
import signal
import subprocess
import sys
import threading
from unittest.mock import patch

import pytest
from conftest import DRIVER, wait_until

from cjm_fasthtml_resources.core.answering import Follower, decide_for, find_follower, find_questions, unload_for
from cjm_fasthtml_resources.core.conflict import ResourceBusy
from cjm_fasthtml_resources.core.freeing import RoomMade
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.questions import Answer, describe_answers, note_answer, read_answers, worker_key
from cjm_fasthtml_resources.core.samples import take_sample
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu, SimulatedProcess
from cjm_fasthtml_resources.ui.view import View, render_reservations

# an app whose own process has the model, and a plugin that answers what argument 1 says
HOLDER = DRIVER + """
import sys, time
from cjm_fasthtml_resources.core.manager import ResourceManager

class Llama:
    def __init__(self):
        self.model = driver.allocate(MEMORY)
        self.model.__enter__()
    def release(self): self.model.__exit__(None, None, None)
    def on_request(self, question):
        print(question, flush=True)
        return dict(yes=True, no=False).get(ANSWER)

manager = ResourceManager(app="chat")
manager.register_worker(os.getpid(), "llm", loaded_plugin_resource="llama-8b", plugin_instance=Llama())
print("ready", flush=True)
time.sleep(120)
"""

ASKER = DRIVER + """
from cjm_fasthtml_resources.core.manager import ResourceManager
print("ready", flush=True)
with ResourceManager(app="speech").reserve(10_000, ask_idle=True): print("granted", flush=True)
"""


@pytest.fixture
def holder(tmp_path, monkeypatch, spawn):
    "Start an app with an idle model, which answers so"
    monkeypatch.setenv("CJM_RESOURCES_DIR", str(tmp_path/"state"))
    monkeypatch.setenv("GPUS", str(tmp_path/"gpus"))

    def start(answer: str, memory: int = 18_000) -> subprocess.Popen:
        process = spawn(f"ANSWER, MEMORY = {answer!r}, {memory}" + HOLDER)
        assert process.stdout.readline() == "ready\n"
        return process
    return start


def test_a_plugin_that_agrees_makes_room_and_its_process_goes_on(holder, spawn):
    chat, speech = holder("yes"), spawn(ASKER)
    assert [speech.stdout.readline() for _ in range(2)] == ["ready\n", "granted\n"]
    assert chat.stdout.readline().startswith("The speech app needs 9.8 GiB on GPU 0. The idle llm worker")
    assert chat.poll() is None and speech.wait(10) == 0


def test_two_processes_of_an_app_each_unload_their_own_model(holder, spawn):
    first, second = holder("yes", 10_500), holder("yes", 10_500)
    speech = spawn(ASKER.replace("10_000", "20_000"))
    assert [speech.stdout.readline() for _ in range(2)] == ["ready\n", "granted\n"]
    assert first.poll() is second.poll() is None and speech.wait(10) == 0


def test_a_model_of_another_process_stays_where_its_plugin_refuses(holder, spawn):
    first, second = holder("no", 10_500), holder("yes", 10_500)
    speech = spawn(ASKER)
    assert [speech.stdout.readline() for _ in range(2)] == ["ready\n", "granted\n"]
    with SimulatedDriver([SimulatedGpu("NVIDIA L4")], shared=os.environ["GPUS"]):
        found = ResourceManager(app="chat", track_self=False).get_all_workers()
    assert {w.pid: bool(w.loaded_plugin_resource) for w in found} == {first.pid: True, second.pid: False}


def test_a_plugin_that_refuses_keeps_its_model_and_the_asker_is_told(holder, spawn):
    holder("no")
    code = ASKER.replace("ask_idle=True)", "8, ask_idle=True)").replace("10_000, 8", "10_000, timeout=8")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert out.returncode == 1 and "Gave up after 8 s. chat of " in out.stderr and "said no." in out.stderr, out.stderr


def test_a_question_goes_with_the_process_that_asked_however_it_ends(holder, spawn):
    holder("people")
    speech = spawn(ASKER)
    assert speech.stdout.readline() == "ready\n"
    with SimulatedDriver([SimulatedGpu("NVIDIA L4")], shared=os.environ["GPUS"]):
        chat = ResourceManager(app="chat", track_self=False)
        wait_until(chat.get_questions, 20)
        speech.send_signal(signal.SIGKILL)
        speech.wait()
        wait_until(lambda: not chat.get_questions(), 5)


# In one process


class Llama:
    "A plugin whose model is on a simulated GPU"
    def __init__(self, gpu): self.gpu = gpu
    def release(self): self.gpu.processes.clear()


@pytest.fixture
def asked(tmp_path, monkeypatch, spawn):
    "A manager with an idle worker that has a model, and a request of another app that asks"
    monkeypatch.setenv("CJM_RESOURCES_DIR", str(tmp_path))
    with SimulatedDriver([SimulatedGpu(memory_total_mb=24_000)]) as driver:
        worker = spawn("input()").pid
        driver.gpus[0].processes.append(SimulatedProcess(worker, 18_000))
        chat = ResourceManager(app="chat", track_self=False)
        chat.register_worker(worker, "llm", loaded_plugin_resource="llama-8b", plugin_instance=Llama(driver.gpus[0]))
        request = ResourceManager(app="speech", track_self=False).request(10_000, ask_idle=True)
        assert request.poll() is None
        yield chat, request, worker
        request.withdraw()


def test_a_worker_that_got_a_job_after_the_question_keeps_its_model(asked):
    chat, request, worker = asked
    [question] = find_questions(chat)
    chat.update_worker_state(worker, job_id="job-1", status="running")
    assert not unload_for(chat, question)[0].steps and request.poll() is None
    assert chat.get_worker_by_pid(worker).loaded_plugin_resource == "llama-8b"


def test_only_who_asked_to_ask_is_shown_to_others(asked):
    chat, request, _ = asked
    request.withdraw()
    quiet = ResourceManager(app="speech", track_self=False).request(10_000)
    assert quiet.poll() is None and chat.get_questions() == []
    quiet.withdraw()
    with pytest.raises(TypeError, match="ask_idle"): chat.request(10, ask_idle="yes")


def test_a_request_for_a_whole_gpu_asks_for_all_of_it(asked):
    chat, request, _ = asked
    request.withdraw()
    whole = ResourceManager(app="speech", track_self=False).request("all", ask_idle=True)
    assert whole.poll() is None
    [question] = chat.get_questions()
    assert question.memory == int(0.9*24_000*2**20)
    assert "unloaded llama-8b" in chat.answer(question.id, True) and whole.poll() is not None
    whole.withdraw()


def test_a_request_that_a_cap_holds_back_asks_nothing_since_room_is_no_help(asked, tmp_path):
    chat, request, _ = asked
    request.withdraw()
    (tmp_path/"settings.toml").write_text("max_share = 0.5")
    (tmp_path/"settings.toml").chmod(0o600)
    speech = ResourceManager(app="speech", track_self=False)
    with speech.reserve(4_000, timeout=0):
        capped = speech.request(10_000, ask_idle=True)
        assert capped.poll() is None and chat.get_questions() == []
        capped.withdraw()


def test_a_request_behind_another_asks_nothing_since_room_would_go_to_that(asked):
    chat, request, _ = asked
    request.withdraw()
    first = ResourceManager(app="other", track_self=False).request(12_000)
    second = ResourceManager(app="speech", track_self=False).request(10_000, ask_idle=True)
    assert first.poll() is second.poll() is None and chat.get_questions() == []
    first.withdraw()
    assert len(chat.get_questions()) == 1
    second.withdraw()


def test_a_fork_s_child_asks_and_answers_at_once(asked):
    chat, request, _ = asked
    chat.follow_questions()
    child = os.fork()
    if not child:
        try: os._exit(0 if len(chat.get_questions()) == 1 else 1)
        finally: os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def make_browser(manager, **given):
    from fasthtml.core import FastHTML
    from starlette.testclient import TestClient

    from cjm_fasthtml_resources.ui.web import resource_routes
    app = FastHTML(default_hdrs=False, secret_key="x")
    resource_routes(app, manager, **given)
    return TestClient(app, follow_redirects=False)


def test_the_page_shows_a_question_and_takes_the_answer(asked):
    pytest.importorskip("fasthtml", reason="the extra web is not installed")
    chat, request, worker = asked
    [question] = chat.get_questions()
    browser = make_browser(chat, controls=True, guard=lambda req: None)
    page = browser.get("/resources").text
    assert "The speech app needs 9.8 GiB on GPU 0" in page and "Unload" in page
    assert f"value={question.id}.1.{worker}" in page
    same = {"origin": "http://testserver"}
    for wrong, status in (("", 400), ("x.1.7", 400), (f"{question.id}.1", 400), (f"{question.id}.2.7", 400),
                          (f"{question.id}.1.7,", 400), ("99.1.7", 409), (f"{question.id}.1.7", 409)):
        assert browser.post("/resources/answer", data=dict(question=wrong), headers=same).status_code == status
    yes = dict(question=f"{question.id}.1.{worker}")
    foreign = browser.post("/resources/answer", data=yes, headers={"origin": "http://evil"})
    assert foreign.status_code == 403 and request.poll() is None
    done = browser.post("/resources/answer", data=yes, headers=same)
    assert (done.status_code, done.headers["location"]) == (303, "../resources")
    assert request.poll() is not None
    wait_until(lambda: "The speech app" not in browser.get("/resources").text, 5)


def test_a_page_without_controls_shows_the_question_alone(asked):
    pytest.importorskip("fasthtml", reason="the extra web is not installed")
    browser = make_browser(asked[0])
    page = browser.get("/resources").text
    assert "The speech app needs 9.8 GiB on GPU 0" in page and "Unload</button>" not in page
    assert browser.post("/resources/answer", data=dict(question="1.1.7")).status_code in (404, 405)


def test_the_panel_shows_a_question_and_takes_the_answer(asked):
    from cjm_fasthtml_resources.ui.panel import ResourcePanel
    chat, request, _ = asked
    panel = ResourcePanel(chat, interval=0.2, controls=True)
    try:
        unload, keep = panel._consents.box.children
        assert unload.description.startswith("Unload for speech") and keep.description.startswith("Keep")
        assert "The speech app needs 9.8 GiB" in panel._slots["questions"].value
        unload.click()
        wait_until(lambda: "unloaded llama-8b" in panel._said.value, 10)
        assert request.poll() is not None
        panel._show(take_sample(chat))
        assert panel._consents.box.children == () and panel._slots["questions"].value == ""
    finally: panel.close()


def test_an_answer_after_the_request_is_over_is_said_in_words(asked):
    chat, request, _ = asked
    [question] = chat.get_questions()
    request.withdraw()
    with pytest.raises(LookupError, match="no question for chat now. No request asks one now."):
        chat.answer(question.id, True)


def test_the_one_who_gives_up_learns_that_there_was_no_answer(asked):
    request = asked[1]
    request.withdraw()
    speech = ResourceManager(app="speech", track_self=False)
    with pytest.raises(ResourceBusy, match="No idle holder has answered"):
        speech.reserve(10_000, timeout=0, ask_idle=True)


# A yes is for the worker that was named, and a no of its plugin stays one


def add_worker(chat, spawn, driver, memory, **given):
    "Register another idle worker of the app, with a model of so many MiB"
    pid = spawn("input()").pid
    driver.gpus[0].processes.append(SimulatedProcess(pid, memory))
    chat.register_worker(pid, "llm", loaded_plugin_resource="mistral-7b", **given)
    return pid


class Second:
    "A plugin with one process on a GPU, which answers so"
    def __init__(self, gpu, says=None): self.gpu, self.says, self.questions, self.pid = gpu, says, [], 0
    def release(self): self.gpu.processes[:] = [p for p in self.gpu.processes if p.pid != self.pid]
    def on_request(self, question):
        self.questions.append(str(question))
        return self.says


@pytest.fixture
def two(tmp_path, monkeypatch, spawn):
    "A manager with two idle workers, either of which would make room, and a request that asks"
    monkeypatch.setenv("CJM_RESOURCES_DIR", str(tmp_path))
    monkeypatch.setattr(Follower, "start", lambda self: None)   # each test looks by itself
    with SimulatedDriver([SimulatedGpu(memory_total_mb=24_000)]) as driver:
        chat = ResourceManager(app="chat", track_self=False)
        plugins = [Second(driver.gpus[0]) for _ in range(2)]
        for plugin in plugins: plugin.pid = add_worker(chat, spawn, driver, 11_000, plugin_instance=plugin)
        request = ResourceManager(app="speech", track_self=False).request(10_000, ask_idle=True)
        assert request.poll() is None
        yield chat, request, plugins
        request.withdraw()


def loaded(chat): return [w.pid for w in chat.get_all_workers() if w.loaded_plugin_resource]


def test_who_agreed_for_a_worker_is_asked_again_for_another(two):
    chat, request, (first, second) = two
    [question] = chat.get_questions()
    assert question.pids == (first.pid,)
    settle = find_follower(chat)
    decide_for(chat, question, [worker_key(question.workers[0])], True)     # a yes, which nobody has acted on
    chat.update_worker_state(first.pid, job_id="job-1", status="running")
    settle.look()
    [other] = chat.get_questions()
    assert other.pids == (second.pid,) and not other.agreed
    assert loaded(chat) == [first.pid, second.pid] and request.poll() is None
    chat.update_worker_state(first.pid, status="idle")
    chat.update_worker_state(second.pid, job_id="job-2", status="running")
    settle.look()                                                           # that yes still counts
    assert loaded(chat) == [second.pid] and request.poll() is not None


def test_a_plugin_s_no_is_for_its_worker_alone(two):
    chat, request, (first, second) = two
    first.says, second.says = False, True
    find_follower(chat).look()
    find_follower(chat).look()
    assert loaded(chat) == [first.pid] and request.poll() is not None
    assert len(first.questions) == len(second.questions) == 1


def test_a_person_s_yes_does_not_overrule_a_plugin_s_no(two):
    chat, request, (first, second) = two
    first.says = second.says = False
    find_follower(chat).look()
    find_follower(chat).look()
    assert chat.get_questions() == [] and loaded(chat) == [first.pid, second.pid]
    with pytest.raises(LookupError, match="has no question for chat now"): chat.answer(1, True)
    said = describe_answers(read_answers(chat.ledger.store))
    assert said.startswith("chat of ") and said.endswith(" said no."), said
    assert request.poll() is None


def test_an_answer_that_names_other_workers_changes_nothing(two):
    chat, request, (first, second) = two
    [question] = chat.get_questions()
    chat.update_worker_state(first.pid, job_id="job-1", status="running")
    with pytest.raises(LookupError, match=f"The question has changed. Now: .*PID {second.pid}"):
        chat.answer(question.id, True, question.pids)
    assert loaded(chat) == [first.pid, second.pid] and request.poll() is None


def test_both_of_two_workers_unload_where_one_is_too_little(two):
    chat, request, (first, second) = two
    request.withdraw()
    large = ResourceManager(app="speech", track_self=False).request(20_000, ask_idle=True)
    assert large.poll() is None
    [question] = chat.get_questions()
    assert question.pids == (first.pid, second.pid)
    first.says = second.says = True
    find_follower(chat).look()
    assert loaded(chat) == [] and large.poll() is not None
    large.withdraw()


def test_nothing_is_unloaded_in_vain_where_one_of_two_refuses(two):
    chat, request, (first, second) = two
    request.withdraw()
    large = ResourceManager(app="speech", track_self=False).request(20_000, ask_idle=True)
    assert large.poll() is None
    first.says, second.says = True, False
    find_follower(chat).look()
    find_follower(chat).look()
    assert loaded(chat) == [first.pid, second.pid] and chat.get_questions() == []
    large.withdraw()


def test_a_release_that_fails_is_said_and_not_tried_again(asked):
    chat, request, worker = asked
    calls = []

    class Broken:
        "A plugin that cannot release"
        def release(self):
            calls.append(1)
            raise RuntimeError("the device is lost")

    chat.register_worker(worker, "llm", loaded_plugin_resource="llama-8b", plugin_instance=Broken())
    [question] = chat.get_questions()
    with pytest.raises(ResourceBusy, match="it raised RuntimeError"): chat.answer(question.id, True)
    assert chat.get_questions() == [] and request.poll() is None and calls == [1]
    [answer] = read_answers(chat.ledger.store)
    assert not answer.is_yes and "it raised RuntimeError" in answer.done


def test_a_release_that_hangs_counts_as_failed(asked):
    chat, request, worker = asked
    go_on = threading.Event()

    class Hanging:
        "A plugin that does not come back"
        def release(self): go_on.wait(30)

    chat.register_worker(worker, "llm", loaded_plugin_resource="llama-8b", plugin_instance=Hanging())
    [question] = chat.get_questions()
    made, failed = unload_for(chat, question, grace=0.3)
    go_on.set()
    assert failed.pid == worker and not made.released and "0.3 s" in str(made), made
    assert request.poll() is None


def test_a_worker_with_a_reservation_of_its_own_is_left_alone(asked):
    chat, request, worker = asked
    request.withdraw()
    with chat.reserve(4_000, timeout=0, pid=worker):
        again = ResourceManager(app="speech", track_self=False).request(10_000, ask_idle=True)
        assert again.poll() is None and chat.get_questions() == []      # it counts on that memory
        again.withdraw()


def test_a_request_that_lacks_ram_asks_for_no_gpu_memory(asked):
    chat, request, _ = asked
    request.withdraw()
    speech = ResourceManager(app="speech", track_self=False)
    free = chat.check_memory_availability().memory.room >> 20
    with speech.reserve(memory_mb=free*0.7, timeout=0):
        both = speech.request(10_000, memory_mb=free*0.6, ask_idle=True)
        assert both.poll() is None and chat.get_questions() == []
        both.withdraw()


def test_a_model_s_name_reaches_a_terminal_without_its_escape_sequences(asked):
    chat, request, worker = asked
    hostile = "\x1b[2J\x1b]0;owned\x07\u202emodel"
    chat.register_worker(worker, "llm\x1b[1m", loaded_plugin_resource=hostile)
    chat.follow_questions(lambda worker: False)
    [question] = chat.get_questions()
    assert str(question).isprintable() and "model" in str(question)
    note_answer(chat.ledger.store, Answer(question.lease, hostile, 0, True, hostile))
    assert describe_answers(read_answers(chat.ledger.store)).isprintable()


def test_a_row_that_no_answer_can_be_is_left_out(asked):
    chat, request, _ = asked
    [question] = chat.get_questions()
    note_answer(chat.ledger.store, Answer(question.lease, "other", 7, False))
    with chat.ledger.store.transaction() as db:
        db.execute("INSERT INTO answers VALUES (?, 'x', 'not a UID', 0, '')", [question.lease])
    assert [a.app for a in read_answers(chat.ledger.store)] == ["other"]


def test_the_one_who_asks_sees_it_on_its_page_with_the_answers(asked):
    chat, request, _ = asked
    speech = ResourceManager(app="speech", track_self=False)
    assert "The request asks idle workers of other apps to unload." in render_reservations(take_sample(speech), View())
    chat.answer(chat.get_questions()[0].id, False)
    page = render_reservations(take_sample(speech), View())
    assert re.search(r"The request asks idle workers of other apps to unload\. chat of \S+ said no\.", page), page


def test_a_decision_ends_with_the_request(asked):
    chat, request, _ = asked
    [question] = chat.get_questions()
    chat.answer(question.id, False)
    request.withdraw()
    again = ResourceManager(app="speech", track_self=False).request(10_000, ask_idle=True)
    assert again.poll() is None and len(chat.get_questions()) == 1
    again.withdraw()


def test_the_page_and_the_panel_offer_no_answer_where_the_app_has_agreed(two):
    pytest.importorskip("fasthtml", reason="the extra web is not installed")
    from cjm_fasthtml_resources.ui.panel import ResourcePanel
    chat, request, (first, _) = two
    [question] = chat.get_questions()
    with patch("cjm_fasthtml_resources.core.answering.unload_for", return_value=(RoomMade(), None)):
        decide_for(chat, question, [worker_key(question.workers[0])], True)
        page = make_browser(chat, controls=True, guard=lambda req: None).get("/resources").text
        assert "You agreed to unload it." in page and ">Unload</button>" not in page
        panel = ResourcePanel(chat, interval=0.2, controls=True)
        try: assert panel._consents.box.children == () and "You agreed" in panel._slots["questions"].value
        finally: panel.close()
