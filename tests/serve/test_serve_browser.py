"""The chat page in a real Chromium, against a real server with toy models."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path

import pytest

import serve_toys
from foveate.serve.page import STATIC

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright.expect
expect.set_options(timeout=30_000)
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
AXE = Path(__file__).parents[2] / "web" / "node_modules" / "axe-core" / "axe.min.js"
HOSTILE = "<img src=x onerror=stolen=1><script>stolen=1</script> [a](javascript:stolen=1) ![b](//elsewhere/b.png)\n"
CODE = "```python\ndef f():\n    return 1\n```\n"

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here: install the package chromium"),
    pytest.mark.skipif(not (STATIC / "index.html").exists(), reason="the page has not been built: `make page`"),
    # dates of the browser's driver, not of this package
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def saying(folder, text: str):
    """A model whose every reply is this text."""

    def load():
        llm = serve_toys.make_llm(folder)
        exactly = "".join(f"\\x{{{ord(c):X}}}" if not c.isalnum() else c for c in text)
        llm.default_params = llm.default_params.with_(regex=exactly)
        return llm

    return load


def slow(folder):
    """A model whose steps take so long that a reply can be stopped before it ends."""
    llm = serve_toys.make_llm(folder)
    step = llm.engine.step

    def later():
        time.sleep(0.1)
        return step()

    llm.engine.step = later
    return llm


def without_template(folder):
    llm = serve_toys.make_llm(folder)
    llm.tokenizer.chat_template = None
    return llm


@pytest.fixture(scope="module")
def server(folder):
    models = {
        "toy": lambda: serve_toys.make_llm(folder), "hostile": saying(folder, HOSTILE), "code": saying(folder, CODE),
        "slow": lambda: slow(folder), "plain": lambda: without_template(folder),
    }  # fmt: skip
    with serve_toys.serving(models) as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    quiet = (
        "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update "
        "--disable-sync"
    )
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=quiet.split())
        yield started
        started.close()


@pytest.fixture
def page(browser, server):
    """A new visitor, whose settings keep replies short. Anything that goes wrong in the page fails the test."""
    granted = ["clipboard-read", "clipboard-write"]
    # nothing moves, so that no colour is measured on its way to another
    context = browser.new_context(base_url=server.url, permissions=granted, reduced_motion="reduce")
    context.set_default_timeout(30_000)
    opened = context.new_page()
    faults: list[str] = []
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    opened.goto("/")
    settings = '{"max_tokens": 120, "seed": 3}'
    opened.evaluate(f"localStorage['foveate.settings'] = '{settings}'")
    opened.reload()
    expect(opened.locator("#model")).to_be_enabled()
    yield opened
    context.close()
    assert faults == []


def choose(page, model: str) -> None:
    page.select_option("#model", model)
    expect(page.locator("#about-model")).to_have_text(model)


def send(page, text: str) -> None:
    page.fill("#input", text)
    page.press("#input", "Enter")


def replies(page, count: int):
    """The replies, once there are so many and none is being written."""
    found = page.locator(".assistant")
    expect(found).to_have_count(count)
    expect(page.locator("#send")).to_be_visible()
    return found


def test_a_conversation(page, server):
    """Sent, streamed, kept over a reload, edited, regenerated, copied, deleted."""
    send(page, "the quick brown fox")
    first = replies(page, 1).locator(".body").inner_text()
    said = server.post(
        "/v1/chat/completions", model="toy", messages=[{"role": "user", "content": "the quick brown fox"}], max_tokens=120, seed=3
    ).json()  # fmt: skip
    page.get_by_role("button", name="Copy", exact=True).nth(1).click()
    assert page.evaluate("navigator.clipboard.readText()") == said["choices"][0]["message"]["content"]
    expect(page.locator(".assistant .statistics")).to_contain_text(f"{said['usage']['completion_tokens']} tokens")
    expect(page.locator(".assistant .statistics")).to_contain_text(f"{said['usage']['prompt_tokens']} prompt tokens")

    send(page, "over the lazy dog")
    replies(page, 2)
    page.reload()
    assert replies(page, 2).locator(".body").first.inner_text() == first
    expect(page.locator("#conversations .open")).to_have_text("the quick brown fox")

    page.get_by_role("button", name="Regenerate").last.click()
    replies(page, 2)
    page.get_by_role("button", name="Edit").first.click()
    page.locator(".user textarea").fill("again and again")
    page.keyboard.press("Enter")
    replies(page, 1)  # what followed the edited message is gone
    expect(page.locator(".user .text")).to_have_text("again and again")

    page.get_by_role("button", name="New conversation").first.click()
    expect(page.locator("#empty")).to_be_visible()
    page.get_by_role("button", name="Delete “again and again”").click()
    page.reload()
    expect(page.locator("#conversations li")).to_have_count(0)


def test_stop_ends_the_work(page, server):
    choose(page, "slow")
    send(page, "x")
    expect(page.locator(".assistant .statistics")).to_contain_text("tokens")  # it streams
    page.keyboard.press("Escape")
    replies(page, 1)
    expect(page.locator(".note")).to_have_text("Stopped.")
    server.wait(lambda: server.metric("vllm:request_success_total", model_name="slow", finished_reason="abort") == 1)
    assert server.metric("vllm:generation_tokens_total", model_name="slow") < 120


def test_a_hostile_reply_stays_text(page):
    choose(page, "hostile")
    send(page, "<b>bold</b>")
    body = replies(page, 1).locator(".body")
    expect(body).to_contain_text("<img src=x onerror=stolen=1><script>stolen=1</script>")
    assert page.evaluate("typeof stolen") == "undefined"
    assert page.locator("#messages :is(img, script, b, [onerror])").count() == 0
    links = [link.get_attribute("href") for link in page.locator("#messages a").all()]
    assert links == ["//elsewhere/b.png"]  # the image, as a link; the script's address is none


def test_code_is_highlighted_and_copied(page):
    choose(page, "code")
    send(page, "code")
    replies(page, 1)
    expect(page.locator(".code .hljs-keyword").first).to_have_text("def")
    page.get_by_role("button", name="Copy code").click()
    expect(page.locator("#live")).to_have_text("Copied.")
    assert page.evaluate("navigator.clipboard.readText()") == "def f():\n    return 1\n"


def test_tokens_show_their_probability(page):
    page.get_by_role("button", name="Probabilities").click()
    send(page, "the lazy dog")
    replies(page, 1)
    page.locator(".tokens").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(page.locator(".token.current")).to_have_attribute("data-index", "1")
    expect(page.locator(".token-detail")).to_have_text(
        re.compile(r"^“.+” \S+ %; most probable: (“.+” \S+ %,? ?){5}$", re.DOTALL)
    )


def test_the_keyboard_is_enough(page):
    """From the box through the settings, whose dialog holds the focus and gives it back, to a reply and its buttons."""

    def focused() -> str:
        return page.evaluate("document.activeElement.id || document.activeElement.textContent")

    assert focused() == "input"
    page.keyboard.press("Shift+Tab")  # the messages, which scroll
    while focused() != "open-settings":
        page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#settings")).to_be_visible()
    page.locator("#system").focus()
    page.keyboard.type("be brief")
    page.keyboard.press("Escape")
    expect(page.locator("#settings")).to_be_hidden()
    assert focused() == "open-settings"
    assert page.evaluate("JSON.parse(localStorage['foveate.settings']).system") == "be brief"
    page.locator("#input").focus()
    page.keyboard.type("the fox")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("jumps")
    page.keyboard.press("Enter")
    replies(page, 1)
    expect(page.locator(".user .text")).to_have_text("the fox\njumps")
    assert focused() == "input"
    for _ in range(12):
        page.keyboard.press("Shift+Tab")
        if focused() == "Regenerate":
            break
    page.keyboard.press("Enter")
    replies(page, 1)
    names = page.evaluate("[...document.querySelectorAll('button, input, select, textarea')].filter(e => !e.labels?.length && "
                          "!e.textContent.trim() && !e.ariaLabel).map(e => e.outerHTML)")  # fmt: skip
    assert names == []  # everything has a name for a screen reader


def test_a_phone_and_the_dark(page):
    page.set_viewport_size({"width": 360, "height": 640})
    choose(page, "code")
    send(page, "a" * 100)
    replies(page, 1)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.get_by_role("button", name="Conversations", exact=True).click()
    page.get_by_role("button", name="Theme: system").click()
    page.get_by_role("button", name="Theme: light").click()
    page.keyboard.press("Escape")
    expect(page.locator("#sidebar")).to_be_hidden()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 22, 27)"


def test_a_model_without_a_template_continues_text(page, server):
    page.select_option("#model", "plain")
    expect(page.locator("#about-model")).to_contain_text("continues your text")
    send(page, "the quick brown")
    replies(page, 1)
    expect(page.locator(".statistics")).to_contain_text("120 tokens")
    said = server.text(model="plain", prompt="the quick brown", max_tokens=120, seed=3)
    page.get_by_role("button", name="Copy", exact=True).nth(1).click()
    expect(page.locator("#live")).to_have_text("Copied.")
    assert page.evaluate("navigator.clipboard.readText()") == said


@pytest.mark.skipif(not AXE.exists(), reason="axe-core is not installed: `npm ci` in web/")
def test_rules_of_accessibility(page):
    """What axe-core can find, in both themes: names, roles, contrast."""

    def violations() -> list:
        page.evaluate(AXE.read_text())
        found = page.evaluate("axe.run()")["violations"]
        return [(rule["id"], node["html"][:200]) for rule in found for node in rule["nodes"]]

    choose(page, "code")
    send(page, "some code")
    replies(page, 1)
    page.evaluate("document.documentElement.dataset.theme = 'light'")
    assert violations() == []
    page.evaluate("document.documentElement.dataset.theme = 'dark'")
    assert violations() == []
    page.click("#open-settings")
    assert violations() == []
    page.goto("/dashboard")
    expect(page.locator("#state")).to_have_text("ready")
    assert violations() == []


def test_the_dashboard_lives(page, server):
    page.goto("/dashboard")
    running = page.locator("dl > div", has=page.get_by_text("Ended by length", exact=True)).locator(".number")
    expect(page.locator("#state")).to_have_text("ready")
    page.select_option("#model", "code")
    server.text(model="code", prompt="x", max_tokens=2)
    expect(running).to_have_text(re.compile(r"^\d+(\.\d)? %$"))
    expect(page.locator("#canary")).to_contain_text("--canary")
    page.set_viewport_size({"width": 360, "height": 640})
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_key_is_asked_for(browser, folder):
    with serve_toys.serving({"toy": lambda: serve_toys.make_llm(folder)}, api_keys=("browser-key",)) as running:
        context = browser.new_context(base_url=running.url)
        page = context.new_page()
        page.goto("/")
        expect(page.locator("#notice")).to_contain_text("needs an API key")
        page.get_by_role("button", name="Settings").click()
        page.fill("#key", "browser-key")
        page.keyboard.press("Enter")
        expect(page.locator("#model")).to_be_enabled()
        context.close()
