"The page wherever an app is: under a prefix that a proxy removes, mounted, and as a part of other pages"
import re
from urllib.parse import urljoin, urlsplit

import pytest

from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu

pytest.importorskip("fasthtml", reason="the extra web is not installed")

from fasthtml.core import FastHTML  # noqa: E402
from starlette.applications import Starlette  # noqa: E402
from starlette.routing import Mount  # noqa: E402
from starlette.testclient import TestClient  # noqa: E402

from cjm_fasthtml_resources.ui.web import ResourceCard, make_app, resource_routes  # noqa: E402

OUTSIDE = "/user/ada/proxy/8765"


def behind_proxy(app, removed: bool, root_path: str = ""):
    "An ASGI app behind a proxy that removes the prefix, or on a server that puts it back, as uvicorn does"
    async def proxied(scope, receive, send):
        if scope["type"] == "http":
            assert scope["path"].startswith(OUTSIDE)
            cut = len(OUTSIDE) if removed else 0
            scope = {**scope, "path": scope["path"][cut:] or "/", "raw_path": scope["raw_path"][cut:] or b"/",
                     "root_path": root_path}
        await app(scope, receive, send)
    return proxied


FORMS = {
    "mounted": lambda app: Starlette(routes=[Mount(OUTSIDE, app=app)]),
    "mounted twice": lambda app: Starlette(routes=[Mount("/user", app=Starlette(routes=[
        Mount(OUTSIDE.removeprefix("/user"), app=app)]))]),
    "removed, and the server does not know": lambda app: behind_proxy(app, removed=True),
    "removed, and the server knows": lambda app: behind_proxy(app, removed=True, root_path=OUTSIDE),
    "the server puts it back": lambda app: behind_proxy(app, removed=False, root_path=OUTSIDE),
}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


@pytest.fixture
def manager():
    with SimulatedDriver([SimulatedGpu()]):
        manager = ResourceManager()
        manager.register_worker(4_200_101, "llm")
        yield manager


def make(manager, prefix):
    "An app with the routes, and with the component on pages of its own"
    app = FastHTML(secret_key="of a test")
    resource_routes(app, manager, prefix, controls=True, guard=lambda req: None)

    @app.get("/")
    def home(): return ResourceCard(manager, prefix)

    @app.get("/team/{name}/")
    async def team(name: str): return ResourceCard(manager, prefix)
    return app


def found(text: str, address: str) -> dict[str, str]:
    "The addresses in a page that is shown at `address`, as a browser resolves them"
    names = dict(script=r"<script[^>]* src=([^ >]+/live)\b", stop=r"<form[^>]* action=([^ >]+)",
                 stream=r"data-cjm-stream=([^ >]+)", page=r"<script[^>]* src=([^ >]+/page)\b",
                 room=r"data-cjm-wish=([^ >]+)")
    matches = {name: re.search(pattern, text.replace('"', "")) for name, pattern in names.items()}
    return {name: urlsplit(urljoin(address, match[1])).path for name, match in matches.items() if match}


@forms
@pytest.mark.parametrize("prefix", ["/resources", "/of/a/team/gpus"])
def test_every_address_of_every_page_is_found(manager, form, prefix):
    browser = TestClient(form(make(manager, prefix)))
    wanted = {name: f"{OUTSIDE}{prefix}/{path}" for name, path in
              dict(script="live", stop="stop", stream="stream").items()}
    for path in (prefix, f"{prefix}/", f"{prefix}/fragment", "/", "/team/ada/", "/team/a%20b/"):
        answer = browser.get(OUTSIDE + path, follow_redirects=False)
        assert answer.status_code == 200, path
        is_page = path.strip("/") == prefix.strip("/")
        own = {name: f"{OUTSIDE}{prefix}/{name}" for name in ("page", "room")} if is_page else {}
        assert found(answer.text, f"http://testserver{OUTSIDE}{path}") == wanted | own, path
    for script in (wanted["script"], f"{OUTSIDE}{prefix}/page"):
        assert browser.get(script).headers["content-type"].startswith("text/javascript")


@forms
def test_after_a_worker_is_stopped_the_browser_is_on_the_page_again(manager, form, spawn):
    process = spawn("input()")
    worker = manager.register_worker(process.pid, "llm")
    browser = TestClient(form(make(manager, "/resources")), headers={"Sec-Fetch-Site": "same-origin"})
    page = browser.get(f"{OUTSIDE}/resources")
    assert f"value={worker.pid}.{worker.start_time}" in page.text.replace('"', "")
    stop = found(page.text, f"http://testserver{OUTSIDE}/resources")["stop"]
    answer = browser.post(stop, data=dict(worker=f"{worker.pid}.{worker.start_time}"))
    assert answer.status_code == 200 and answer.url.path == f"{OUTSIDE}/resources"
    process.wait(10)


def test_a_part_of_a_page_is_addressed_from_the_root_since_it_is_shown_elsewhere(manager):
    "htmx and scripts put it into a page whose address is another"
    app = make(manager, "/resources")
    for browser, before in ((TestClient(app), ""), (TestClient(FORMS["mounted"](app)), OUTSIDE)):
        for headers in ({"HX-Request": "true"}, {"Sec-Fetch-Dest": "empty"}):
            for path in ("/resources/fragment", "/team/ada/"):
                text = browser.get(before + path, headers=headers).text
                assert set(found(text, "http://testserver/any/page").values()) == {
                    f"{before}/resources/{name}" for name in ("live", "stop", "stream")}


@forms
def test_no_header_of_a_client_changes_an_address(manager, form):
    browser = TestClient(form(make(manager, "/resources")))

    def show(**headers):
        "The page without the time of day"
        text = browser.get(f"{OUTSIDE}/resources", headers=headers).text
        return re.sub(r'data-cjm-(now|read)="?\d+|<time.*?</time>', "", text)

    plain = show()
    for name in ("X-Forwarded-Prefix", "X-Forwarded-Host", "X-Forwarded-Path", "X-Original-URL", "X-Rewrite-URL"):
        assert show(**{name: "//evil.example"}) == plain


def test_a_card_without_a_request_and_one_for_other_routes_have_the_address_that_was_given(manager):
    app = make(manager, "/resources")

    @app.get("/page/of/mine")
    def mine(): return ResourceCard(manager, "/elsewhere")

    seen = [str(ResourceCard(manager, "/elsewhere")), TestClient(app).get("/page/of/mine").text]
    for text in seen: assert found(text, "http://testserver/page/of/mine")["stream"] == "/elsewhere/stream"


@forms
def test_the_command_s_own_server_leads_to_its_page_and_its_cookie_stays_below_the_prefix(form):
    with SimulatedDriver([SimulatedGpu()]):
        app = make_app(ResourceManager(track_self=False), token="a b")
        browser = TestClient(form(app))
        assert browser.get(f"{OUTSIDE}/").status_code == 401
        entered = browser.get(f"{OUTSIDE}/", params=dict(token="a b"))
        assert entered.status_code == 200 and entered.url.path == f"{OUTSIDE}/resources" and not entered.url.query
        assert {cookie.path for cookie in browser.cookies.jar if cookie.name == "cjm_resources"} == {OUTSIDE}
        address = f"http://testserver{OUTSIDE}/resources"
        assert browser.get(found(entered.text, address)["script"]).status_code == 200
