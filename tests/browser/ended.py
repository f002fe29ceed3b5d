"""The app of server.py behind a login: ended.py PORT

PUT /test?session=401 (or 403, or login) ends the session of everybody, ?session= begins it again.
"""
import sys

import server
import uvicorn
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse

state = dict(session="")


async def gate(scope, receive, send):
    "Stand before the app"
    if scope["type"] != "http": return await server.app(scope, receive, send)
    request, answer = Request(scope), None
    if request.url.path == "/test" and "session" in request.query_params:
        state["session"] = request.query_params["session"]
    elif request.url.path == "/login": answer = PlainTextResponse("Log in, please")
    elif request.url.path != "/test" and state["session"] == "login": answer = RedirectResponse("/login")
    elif request.url.path != "/test" and state["session"]:
        answer = PlainTextResponse("Log in, please", int(state["session"]))

    async def send_on(message):
        if state["session"] and request.url.path.endswith("/stream"): raise OSError("the proxy cuts the stream")
        await send(message)

    await (answer(scope, receive, send) if answer else server.app(scope, receive, send_on))


if __name__ == "__main__":
    with server.driver:
        try: uvicorn.run(gate, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
        finally: server.worker.kill()
