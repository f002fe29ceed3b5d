"The search of the site: it finds words, and words that mean the same, in a page that people can read"
from pathlib import Path

import pytest

OWN = Path(__file__).resolve().parents[2]/"tools"/"site"
STYLES = OWN.parents[1]/"nbs"/"styles.css"
ENTRIES = [
    dict(href="core/parts.html", title="core.parts", section="memory_key",
         text="Return the key of a bar of memory in the panel, for each part " + "and another word " * 40),
    dict(href="tutorials/start.html#free", title="Get started", section="Look at the GPU",
         text="The command shows how much memory of each GPU is free."),
    dict(href="tutorials/guard.html", title="Guard a job", section="Reserve",
         text="A reservation lasts as long as its job."),
    dict(href="core/manager.html#resourcemanager", title="core.manager", section="ResourceManager", text="The class."),
    dict(href="tutorials/live.html", title="Watch it live", section="", text="Give ResourceManager to a panel. " * 9),
    dict(href="core/a.html", title="core.a", section="", text="No part of <b>one</b> speaks about another."),
]
PAGE = """<html><head><meta name="smalldocs:offset" content="./"></head><body style="background: white">
<div id="quarto-search" class="smalldocs-search"><input><div class="smalldocs-search-results"></div></div>
</body></html>"""


@pytest.fixture
def page(new_page):
    page = new_page()
    page.route("http://site.test/", lambda route: route.fulfill(body=PAGE, content_type="text/html"))
    page.route("http://site.test/search.json", lambda route: route.fulfill(json=ENTRIES))
    page.goto("http://site.test/")
    page.add_script_tag(path=OWN/"search.js")
    page.add_style_tag(path=STYLES)
    return page


def found(page, question):
    return [entry["href"] for entry in page.evaluate("([rows, q]) => searchPages(rows, q)", [ENTRIES, question])]


@pytest.mark.parametrize("question, href", [
    ("how much memory is free", "tutorials/start.html#free"),
    ("how much room is left on the card", "tutorials/start.html#free"),
    ("available VRAM", "tutorials/start.html#free"),
    ("reserving", "tutorials/guard.html"),
    ("promise", "tutorials/guard.html"),
    ("resourcemanager", "core/manager.html#resourcemanager")])
def test_a_question_finds_its_page_first(page, question, href):
    assert found(page, question)[0] == href


def test_a_word_is_found_and_its_letters_in_another_are_not(page):
    assert found(page, "art") == []
    assert found(page, "the of is") == found(page, "is of the")


def test_the_results_are_links_with_the_words_marked(page):
    page.locator("input").fill("room")
    result = page.locator(".search-result")
    result.first.wait_for()
    assert result.first.get_attribute("href") == "./tutorials/start.html#free"
    assert page.locator("mark").first.inner_text() == "free"
    page.locator("input").fill("speaks")
    page.locator("mark", has_text="speaks").wait_for()
    assert "<b>one</b>" in page.locator(".search-result-text").inner_text()   # shown, not read as markup
    page.locator("input").fill("xylophone")
    page.locator(".search-none").wait_for()


def test_the_arrow_keys_choose_a_result(page):
    page.locator("input").fill("memory")
    page.locator(".search-result").nth(1).wait_for()
    for _ in range(2): page.keyboard.press("ArrowDown")
    active = page.locator(".search-result.active")
    assert active.get_attribute("href") == page.locator(".search-result").nth(1).get_attribute("href")
    page.keyboard.press("ArrowUp")
    assert active.get_attribute("href") == page.locator(".search-result").first.get_attribute("href")


@pytest.mark.parametrize("dark", [False, True])
def test_the_results_can_be_read(page, dark):
    "The navbar is dark on a light page, too; its colours once made the results dark on dark"
    page.evaluate("dark => document.documentElement.classList.toggle('quarto-dark', dark)", dark)
    smalldocs = ".search-result { color: var(--bs-body-color) } .search-result-text { color: var(--sd-muted) }"
    page.add_style_tag(content=smalldocs)
    page.locator("input").fill("memory")
    page.locator(".search-result").first.wait_for()
    contrast = page.evaluate("""() => {
        const light = color => color.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
            .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
            .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
        const back = light(getComputedStyle(document.querySelector(".smalldocs-search-results")).backgroundColor);
        return [".search-result", ".search-result-text"].map(name => {
            const text = light(getComputedStyle(document.querySelector(name)).color);
            return (Math.max(text, back) + 0.05) / (Math.min(text, back) + 0.05);
        });
    }""")
    assert min(contrast) >= 4.5, contrast
