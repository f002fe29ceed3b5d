"Servers and a browser for the tests, and for the pictures of the documentation"
import contextlib, shutil, socket, subprocess, time, urllib.request
from pathlib import Path

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def serving(command, url, log, **kw):
    "A server process that answers at `url`"
    with open(log, "w") as file: process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, **kw)
    try:
        end = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(url, timeout=5).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > end: raise RuntimeError(f"{command[0]} did not start: {Path(log).read_text()[-2000:]}") from None
                time.sleep(0.1)
        yield process
    finally:
        process.terminate()
        try: process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def violations(page) -> list[str]:
    "What axe-core finds that is serious, in words"
    from axe_playwright_python.sync_playwright import Axe
    found = Axe().run(page, context=".cjm").response["violations"]
    return [f"{v['id']}: {v['help']}: {[node['html'][:160] for node in v['nodes'][:3]]}" for v in found if v["impact"] in ("serious", "critical")]
