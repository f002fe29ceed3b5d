"""Two kinds of GPU jobs in a web app: uvicorn --app-dir examples job_app:app

For a real GPU, delete the line that ends with `.start()`, and let `command` start your program.
"""
import os
import sys
from asyncio.subprocess import PIPE, create_subprocess_exec

from fasthtml.common import Button, FastHTML, P, Titled

from cjm_fasthtml_resources import ResourceManager
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu
from cjm_fasthtml_resources.ui.web import ResourceCard, resource_routes

NEEDS, TOO_MUCH = {"transcription": 6_000, "diffusion": 12_000}, "diffusion?mb=20000"   # MiB
WORKER = """import sys, time
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu
with SimulatedDriver([SimulatedGpu("NVIDIA L4")], shared=".gpus") as driver:
    with driver.allocate(int(sys.argv[1])): time.sleep(3)"""
SimulatedDriver([SimulatedGpu("NVIDIA L4")], shared=".gpus").start()
app, manager = FastHTML(), ResourceManager(app="studio")
resource_routes(app, manager)

@app.get("/")
def home():
    buttons = [Button(path, hx_post=path, hx_target="#said") for path in (*NEEDS, TOO_MUCH)]
    return Titled("Studio", *buttons, P(id="said"), ResourceCard(manager))

@app.post("/{kind}")
async def start(kind: str, mb: int = 0):   # mb: what the job takes, if more than it needs
    job = manager.job(f"{kind}-{os.urandom(4).hex()}", NEEDS[kind], worker_type=kind, timeout=60)
    try:
        async with job:
            command = [sys.executable, "-c", WORKER, str(mb or NEEDS[kind])]
            process = await create_subprocess_exec(*command, env=os.environ | job.env, stderr=PIPE)
            job.watch(process.pid)
            _, printed = await process.communicate()
            if process.returncode: raise RuntimeError(f"{job.job_id} failed: {printed.decode()}")
    except RuntimeError as error: return P(job.explanation or str(error))   # also ResourceBusy
    return P(f"{job.job_id} is done")
