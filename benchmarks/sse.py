"""Why the page's streams are not sent by sse-starlette: the same hundred clients, and a server that is started again

    pip install sse-starlette httpx && python benchmarks/sse.py
"""
import asyncio
import contextlib
import signal
import threading
import time

import live

THEIRS = """from sse_starlette.sse import EventSourceResponse
import cjm_fasthtml_resources.ui.web as web
web.EventStream = lambda events, places=None: EventSourceResponse(events, ping=0, send_timeout=20)
"""
PORT = 18_766


def app(response):
    "An app with one stream, of five events a second"
    from starlette.applications import Starlette
    from starlette.routing import Route

    async def events():
        while True:
            yield b"event: beat\ndata: 1\n\n"
            await asyncio.sleep(0.2)

    async def stream(request): return response(events())
    return Starlette(routes=[Route("/", stream)])


def listen(port, heard, seconds=2):
    "Count the events of a stream for some seconds, and press Ctrl-C"
    import httpx
    time.sleep(0.7)
    end = time.monotonic() + seconds
    try:
        with httpx.stream("GET", f"http://127.0.0.1:{port}/", timeout=5) as answer:
            for line in answer.iter_lines():
                heard.append(line.startswith("event"))
                if time.monotonic() > end: break
    except httpx.HTTPError as error: print(f"    {type(error).__name__}: {error}")
    signal.raise_signal(signal.SIGINT)


def serve_twice(response, port):
    "Events that a client has in two seconds from a server, and from the next one in the same process, as in a REPL"
    import uvicorn
    for n in range(2):
        heard = []
        threading.Thread(target=listen, args=(port + n, heard)).start()
        with contextlib.suppress(KeyboardInterrupt): uvicorn.run(app(response), port=port + n, log_level="critical")
        yield sum(heard)


def main():
    own, found = live.SERVER, {}
    for name, code in (("this library", own), ("sse-starlette", THEIRS + own)):
        live.SERVER = code
        found[name] = live.stream()[0]
    for name, load in found.items(): print(f"{name}: {live.CLIENTS} clients at 1 Hz cost {100*load:.1f} % of a core")

    from cjm_fasthtml_resources.ui.stream import EventStream
    print("this library, a server and the next one:", *serve_twice(EventStream, PORT), "events")
    from sse_starlette.sse import EventSourceResponse  # which changes uvicorn from here on
    print("sse-starlette, a server and the next one:", *serve_twice(EventSourceResponse, PORT + 2), "events")


if __name__ == "__main__": main()
