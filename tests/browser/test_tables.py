"The tables on the page: sorted by their headers, filtered and folded, while figures and rows come anew"
import json
import sys
import urllib.request
from pathlib import Path

import pytest
from helpers import free_port, serving, violations

SERVER = Path(__file__).with_name("server.py")


@pytest.fixture
def server(chromium, tmp_path):
    "The address of an app, in a process of its own"
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with serving([sys.executable, str(SERVER), str(port)], f"{url}/test", tmp_path/"log"): yield url


@pytest.fixture
def page(server, new_page):
    opened = new_page()
    opened.goto(f"{server}/resources")
    opened.locator("th button").first.wait_for()
    return opened


def ask(server: str, query: str = "") -> dict:
    with urllib.request.urlopen(f"{server}/test{query}", timeout=10) as answer: return json.load(answer)


def grow(server: str, page, mb: int) -> None:
    "Let train.py use so much, and wait until the page has it"
    ask(server, f"?grown={mb}")
    page.locator(".processes td", has_text=f"{mb/1024:.1f} GiB").wait_for()


def header(page, name: str, table: str = "processes"):
    return page.locator(f".{table} th", has=page.get_by_role("button", name=name, exact=True))


def users(page) -> list[str]:
    "The users in the table of processes, as they are seen"
    return [row.locator("td").nth(4).inner_text() for row in page.locator(".processes tbody tr:visible").all()]


def test_a_header_sorts_and_what_comes_anew_is_in_that_order(server, page):
    assert users(page) == ["mallory", "bob"]                      # by memory
    header(page, "user").get_by_role("button").click()
    assert users(page) == ["bob", "mallory"]
    assert header(page, "user").get_attribute("aria-sort") == "ascending"
    for mb in (2500, 4000, 2200):
        grow(server, page, mb)
        assert users(page) == ["bob", "mallory"]
    header(page, "user").get_by_role("button").press("Enter")     # the keyboard does the same
    assert users(page) == ["mallory", "bob"]
    assert header(page, "user").get_attribute("aria-sort") == "descending"
    header(page, "user").get_by_role("button").press(" ")         # and a third time it is as it was
    assert users(page) == ["mallory", "bob"] and header(page, "user").get_attribute("aria-sort") is None
    grow(server, page, 5000)
    assert users(page) == ["bob", "mallory"]
    assert page.locator("[aria-sort]").count() == 0


def test_sizes_are_sorted_as_sizes(server, page):
    grow(server, page, 10_240)
    header(page, "memory").get_by_role("button").click()
    assert users(page) == ["bob", "mallory"]                       # 10.0 GiB, 2.9 GiB
    header(page, "memory").get_by_role("button").click()
    assert users(page) == ["mallory", "bob"]
    ask(server, "?grown=900")
    page.locator(".processes td", has_text="900 MiB").wait_for()
    assert users(page) == ["bob", "mallory"]


def test_a_filter_stays_with_its_focus_and_says_how_much_it_shows(server, page):
    box = page.get_by_role("searchbox", name="Filter")
    box.fill("train BOB")
    assert users(page) == ["bob"]
    assert page.locator("[data-cjm-filter] [role=status]").inner_text() == "1 of 3 rows"
    for mb in (2500, 4000): grow(server, page, mb)
    ask(server, "?temperature=66&used=3000")
    page.get_by_text("66 °C").wait_for()
    assert users(page) == ["bob"] and box.input_value() == "train BOB"
    assert box.evaluate("box => box === document.activeElement")
    assert violations(page) == []
    box.fill("")
    assert len(users(page)) == 2 and page.locator("[data-cjm-filter] [role=status]").inner_text() == ""


def test_totals_are_folded_until_they_are_asked_for_and_then_stay_open(server, page):
    rows = page.locator(".totals td", has_text="bob")
    assert rows.count() == 1 and not rows.is_visible()
    page.get_by_text("Totals by user and by app").click()
    assert rows.is_visible()
    grow(server, page, 4096)
    page.locator(".totals td", has_text="4.0 GiB").first.wait_for()
    assert rows.is_visible() and violations(page) == []
    assert page.locator(".totals script, .totals img").count() == 0


def test_a_selection_stays_where_nothing_moves(server, page):
    header(page, "user").get_by_role("button").click()
    page.evaluate("""() => getSelection().selectAllChildren(
        [...document.querySelectorAll('.processes td')].find(td => td.textContent === 'train.py'))""")
    for mb in (2500, 4000): grow(server, page, mb)
    assert page.evaluate("getSelection().toString()") == "train.py"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 390, 700, 1280])
def test_everybody_can_read_the_tables(server, new_page, scheme, width):
    page = new_page(width=width, color_scheme=scheme)
    page.goto(f"{server}/resources")
    page.get_by_text("Totals by user and by app").click()
    header(page, "owner").get_by_role("button").click()
    assert violations(page) == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    for td in page.locator(".processes tbody tr:first-child td:visible").all():
        assert td.bounding_box()["width"] > 15, td.inner_text()


def test_without_its_script_nothing_stands_there_that_does_nothing(server, new_page):
    page = new_page(java_script_enabled=False)
    page.goto(f"{server}/resources")
    assert page.locator("th button").count() == page.get_by_role("searchbox").count() == 0
    page.get_by_text("Totals by user and by app").click()
    assert page.locator(".totals td", has_text="bob").is_visible()
