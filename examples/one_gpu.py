"""Three worker processes of two types on one GPU with room for one model at a time: python examples/one_gpu.py

Needs no GPU: each worker "loads its model" on a simulated one that all processes share. Everything else is as in an
app.
"""
import os
import subprocess
import sys
import tempfile
import time

from cjm_fasthtml_resources import ResourceManager
from cjm_fasthtml_resources.core.validation import ValidationResult, validate_resources_for_job
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu

MODEL = 16_000  # MiB
WORKER = """import os, sys
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu
kind, plugin, memory = *sys.argv[1:], 16_000
manager = ResourceManager(app="example", track_self=False)
with SimulatedDriver([SimulatedGpu("NVIDIA L4")], shared=os.environ["GPUS"]) as driver:
    for job in iter(sys.stdin.readline, ""):
        with manager.reserve(memory, timeout=30) as gpu:
            manager.update_worker_state(os.getpid(), job_id=job.strip(), status="running",
                                        plugin_name=plugin, loaded_plugin_resource="large")
            with driver.allocate(memory, gpu.index):      # a real worker loads its model here
                print("began", job.strip(), flush=True)
                sys.stdin.readline()                      # and works until it is told that it is done
                manager.update_worker_state(os.getpid(), status="idle")
                print("ended", job.strip(), flush=True)
                if kind == "llm": sys.stdin.readline()    # keeps its model loaded, idle
            manager.update_worker_state(os.getpid(), plugin_name=None, loaded_plugin_resource=None)
"""


class Registry:
    "The app's plugins"
    def get_plugin(self, plugin_id): return {"name": plugin_id}
    def load_plugin_config(self, plugin_id): return {"model": "large", "device": "cuda"}


class Worker:
    "A worker process, and what it is told over a pipe"
    def __init__(self, kind: str, name: str, manager: ResourceManager) -> None:
        self.name = name
        command = [sys.executable, "-c", WORKER, kind, name]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        manager.register_worker(self.process.pid, kind)

    def tell(self, text: str) -> None:
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()

    def hear(self) -> str: return self.process.stdout.readline().strip()


def wait_until(condition) -> None:
    "Until it is so; an error after 30 s"
    end = time.monotonic() + 30
    while not condition():
        if time.monotonic() > end: raise TimeoutError("the example hangs")
        time.sleep(0.02)


def queued(manager: ResourceManager) -> int: return len(manager.get_claims())


def ask(manager: ResourceManager, plugin: str) -> ValidationResult:
    "Whether one more transcription job could start now"
    return validate_resources_for_job(manager, Registry(), plugin, worker_type="transcription", gpu_memory_mb=MODEL)


def take_turns(manager: ResourceManager, workers: list[Worker]) -> None:
    "Each worker has a job, and the GPU has room for one"
    whisper, parakeet, _ = workers
    for number, worker in enumerate(workers, 1):
        worker.tell(f"job-{number}")
        wait_until(lambda number=number: queued(manager) == number)
    began, answer = whisper.hear(), ask(manager, "whisper")
    print(f"2. Three jobs and room for one: {began}. A fourth: {answer.action.name}\n   {answer.message}")
    said = []
    for worker, after in zip(workers, [*workers[1:], None], strict=True):
        worker.tell("done")
        said += [worker.hear(), *([after.hear()] if after else [])]
    print("  ", ", ".join(said))
    wait_until(lambda: manager.get_worker_by_pid(parakeet.process.pid).plugin_name is None)


def make_room(manager: ResourceManager) -> None:
    "The last worker keeps its model loaded, so it is stopped"
    answer = ask(manager, "whisper")
    print(f"3. The llm worker is idle and keeps its model: {answer.action.name}\n   {answer.message}")
    stopped = ", ".join(worker.plugin_name for worker in manager.free_gpu(MODEL))
    print("   Stopped:", stopped, "and then:", ask(manager, "whisper").action.name)


def lose_the_holder(manager: ResourceManager, workers: list[Worker]) -> None:
    "A worker is killed while it has the GPU; the one that waits gets it"
    whisper, parakeet, _ = workers
    whisper.tell("job-4")
    began = whisper.hear()
    parakeet.tell("job-5")
    wait_until(lambda: queued(manager) == 2)
    whisper.process.kill()
    whisper.process.wait()
    killed = time.monotonic()
    next_one = parakeet.hear()
    when = "at once" if time.monotonic() - killed < 2 else "late"
    parakeet.tell("done")
    print(f"4. {began}, job-5 waits. The holder is killed: {next_one} {when}, {parakeet.hear()}")


def main() -> None:
    manager = ResourceManager(app="example", track_self=False)
    with SimulatedDriver([SimulatedGpu("NVIDIA L4")], shared=os.environ["GPUS"]):
        names = {"whisper": "transcription", "parakeet": "transcription", "llama": "llm"}
        workers = [Worker(kind, name, manager) for name, kind in names.items()]
        try:
            print("1. Nobody is there:", ask(manager, "whisper").action.name)
            take_turns(manager, workers)
            make_room(manager)
            lose_the_holder(manager, workers)
        finally:
            for worker in workers:
                worker.process.kill()
                worker.process.communicate()
        manager.prune_dead_workers()
        answer = manager.check_gpu_availability()
        print(f"5. Left over: {len(manager.get_all_workers())} workers, {queued(manager)} promises;", answer.message)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:  # an app of yours leaves the file where it belongs, and has real GPUs
        os.environ.update(CJM_RESOURCES_DIR=f"{folder}/state", GPUS=f"{folder}/gpus")
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        main()
