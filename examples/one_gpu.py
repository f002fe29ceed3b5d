"""Three worker processes of two types on one GPU with room for one model at a time: python examples/one_gpu.py

Needs no GPU: each worker "loads its model" on a simulated one that all processes share. Everything else is as in an app.
"""
import os, subprocess, sys, tempfile, time

WORKER = """import os, sys
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu
kind, plugin, memory = *sys.argv[1:], 16_000
manager = ResourceManager(app="example", track_self=False)
with SimulatedDriver([SimulatedGpu("NVIDIA L4")], shared=os.environ["GPUS"]) as driver:
    for job in iter(sys.stdin.readline, ""):
        with manager.reserve(memory, timeout=30) as gpu:
            manager.update_worker_state(os.getpid(), job_id=job.strip(), status="running", plugin_name=plugin, loaded_plugin_resource="large")
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
    def __init__(self, kind: str, name: str, manager) -> None:
        self.name = name
        self.process = subprocess.Popen([sys.executable, "-c", WORKER, kind, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
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


def main() -> None:
    from cjm_fasthtml_resources import ResourceManager, validate_resources_for_job
    from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu
    manager = ResourceManager(app="example", track_self=False)
    queued = lambda: len(manager.get_claims())
    ask = lambda plugin: validate_resources_for_job(manager, Registry(), plugin, worker_type="transcription", gpu_memory_mb=16_000)
    with SimulatedDriver([SimulatedGpu("NVIDIA L4")], shared=os.environ["GPUS"]):
        workers = [Worker("transcription", "whisper", manager), Worker("transcription", "parakeet", manager), Worker("llm", "llama", manager)]
        whisper, parakeet, llama = workers
        try:
            print("1. Nobody is there:", ask("whisper").action.name)

            for number, worker in enumerate(workers, 1):
                worker.tell(f"job-{number}")
                wait_until(lambda: queued() == number)
            began, answer = whisper.hear(), ask("whisper")
            print(f"2. Three jobs and room for one: {began}. A fourth: {answer.action.name}\n   {answer.message}")
            said = []
            for worker, after in zip(workers, [*workers[1:], None]):
                worker.tell("done")
                said += [worker.hear(), *([after.hear()] if after else [])]
            print("  ", ", ".join(said))
            wait_until(lambda: manager.get_worker_by_pid(parakeet.process.pid).plugin_name is None)

            answer = ask("whisper")
            print(f"3. The llm worker is idle and keeps its model: {answer.action.name}\n   {answer.message}")
            print("   Stopped:", ", ".join(w.plugin_name for w in manager.free_gpu(16_000)), "and then:", ask("whisper").action.name)

            whisper.tell("job-4")
            began = whisper.hear()
            parakeet.tell("job-5")
            wait_until(lambda: queued() == 2)
            whisper.process.kill()
            whisper.process.wait()
            killed = time.monotonic()
            next_one = parakeet.hear()
            parakeet.tell("done")
            print(f"4. {began}, job-5 waits. The holder is killed: {next_one} {'at once' if time.monotonic() - killed < 2 else 'late'}, {parakeet.hear()}")
        finally:
            for worker in workers:
                worker.process.kill()
                worker.process.communicate()
        manager.prune_dead_workers()
        print(f"5. Left over: {len(manager.get_all_workers())} workers, {queued()} promises;", manager.check_gpu_availability().message)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:  # an app of yours leaves the file where it belongs, and has real GPUs
        os.environ.update(CJM_RESOURCES_DIR=f"{folder}/state", GPUS=f"{folder}/gpus")
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        main()
