"""The page of an inspection in a real Chromium: what is chosen changes the picture, hovering shows values, hostile tokens stay text."""

from __future__ import annotations

import re
import shutil

import pytest

import generation_toys as toys
from foveate.inspect import Inspector

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright.expect
expect.set_options(timeout=30_000)
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here: install the package chromium"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # dates of the browser's driver
    pytest.mark.usefixtures("one_thread"),
]
TEXT = "the quick brown fox </script><script>document.title='stolen'</script>"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    inspector = Inspector(str(toys.folder(tmp_path_factory.mktemp("toy"))))
    found = inspector.inspect(TEXT, rollout=True)
    found.attributions = inspector.attribute(TEXT).attributions
    return found


@pytest.fixture(scope="module")
def page(found, tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "page.html"
    found.to_html(file, "a page")
    quiet = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update"
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=quiet.split())
        page = browser.new_page()
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on(
            "request", lambda request: problems.append(request.url) if not request.url.startswith("file:") else None
        )
        page.goto(file.as_uri())
        yield page
        browser.close()
        assert problems == []


def picture(page):
    return page.evaluate("document.getElementById('map').toDataURL()")


def test_layer_head_and_row_change_the_picture(page):
    seen = [picture(page)]
    for control, value in (("#layer", "0"), ("#head", "2"), ("#head", "mean"), ("#head", "rollout"), ("#head", "1")):
        page.select_option(control, value)
        assert picture(page) not in seen
        seen.append(picture(page))
    expect(page.locator("#map")).to_have_attribute("aria-label", re.compile("layer 0, head 1"))
    page.locator("#map").focus()
    page.keyboard.press("ArrowDown")
    expect(page.locator("#map")).to_have_attribute("aria-label", re.compile("layer 1, head 1"))
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#map")).to_have_attribute("aria-label", re.compile("layer 1, head 0"))
    expect(page.locator("#head")).to_have_value("0")
    lens = page.locator("#lens-body").inner_text()
    page.keyboard.press("PageUp")
    assert page.locator("#lens-body").inner_text() != lens
    theme = picture(page)
    page.locator("#theme").click()
    assert picture(page) != theme


def test_hover_shows_the_values(page, found):
    page.select_option("#layer", "1")
    page.select_option("#head", "3")
    box = page.locator("#map").bounding_box()
    cells = len(found.tokens)
    width = (box["width"] - 12) / cells
    row, key = len(found.rows) // 2, 2
    place = {"x": 12 + (key + 0.5) * width, "y": (row + 0.5) * box["height"] / len(found.rows)}
    page.locator("#map").hover(position=place)
    weight = float(found.attention[1, 3, row, key])
    expect(page.locator("#map-status")).to_contain_text(f"sees key {key}")
    shown = page.locator("#map-status").inner_text()
    assert float(shown.rpartition(": ")[2]) == pytest.approx(weight, abs=1e-4)
    page.locator(".token").nth(1).hover()
    choice = found.choices[1]
    expect(page.locator("#token-status")).to_contain_text(f"rank {choice.rank}")
    assert f"log-probability {choice.logprob:.4f}" in page.locator("#token-status").inner_text()


def test_tokens_are_coloured_by_what_is_chosen(page, found):
    colours = page.locator("#colour")
    names = colours.locator("option").all_inner_texts()
    assert len(names) == 4 and any("gradient x input" in name for name in names)
    seen = set()
    for value in colours.locator("option").evaluate_all("items => items.map((item) => item.value)"):
        page.select_option("#colour", value)
        seen.add(tuple(page.locator(".token").evaluate_all("items => items.map((item) => item.style.background)")))
    assert len(seen) == 4
    page.select_option("#colour", "attribution0")
    first = float(page.locator(".token").first.get_attribute("data-value"))
    assert first == pytest.approx(float(found.attributions[0].values[0]), rel=1e-4)


def test_hostile_tokens_are_text(page):
    expect(page).to_have_title("a page")
    assert "stolen" in "".join(page.locator(".token").all_inner_texts())
    assert page.locator("script").count() == 2
