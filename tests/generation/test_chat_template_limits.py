"""Chat templates come from strangers: each has 2 s of the processor and 256 MB, and what it does wrong is a sentence."""

from __future__ import annotations

import json
import multiprocessing
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from foveate import CheckpointError
from foveate.tokenizer.chat_template import _worker, render

TOO_MUCH_TIME = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a power": "{{ 10 ** (10 ** 9) }}",
}
TOO_MUCH_MEMORY = {
    "times": "{{ ('a' * 2000000000) | length }}",
    "ljust": "{{ 'a'.ljust(2000000000) | length }}",
    "format": "{{ '%2000000000d' | format(1) | length }}",
    "doubling": "{% set ns = namespace(s='a') %}{% for i in range(31) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s | length }}",
    "tilde": "{% set ns = namespace(s='a') %}{% for i in range(31) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s | length }}",
    "replace": "{% set s = 'a' * 100000 %}{{ s.replace('a', s) | length }}",
    "tojson": "{{ [1] | tojson(indent=2000000000) | length }}",
    "output": "{% set s = 'a' * 1000000 %}{% for i in range(9999) %}{{ s }}{% endfor %}",
}
WRONG = {
    "{% if %}": "Expected an expression",
    "{{ 1 / 0 }}": "division by zero",
    "{{ 1 + 'a' }}": "TypeError",
    "{% include 'x' %}": "no loader",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "without end",
    "{{ range(10**6) }}": "Range too big",
    "{{ nope | tojson }}": "not JSON serializable",
    "{{ " + "(" * 3000 + ")" * 3000 + " }}": "without end|too many nested",
    "{{ raise_exception('roles must alternate') }}": "refuses these messages: roles must alternate",
    "{{ ''.__class__.__mro__ }}": "unsafe",
}  # fmt: skip


@pytest.mark.parametrize("name", TOO_MUCH_TIME)
def test_time(name):
    with pytest.raises(CheckpointError, match="took more than 2 s of the processor"):
        render(TOO_MUCH_TIME[name], {})
    assert render("{{ a }}", {"a": "after"}) == "after"


@pytest.mark.parametrize("name", TOO_MUCH_MEMORY)
def test_memory(name):
    with pytest.raises(CheckpointError, match="needs more than 256 MB"):
        render(TOO_MUCH_MEMORY[name], {})
    assert render("{{ a }}", {"a": "after"}) == "after"


@pytest.mark.parametrize("template", WRONG)
def test_what_templates_do_wrong(template):
    with pytest.raises(CheckpointError, match=WRONG[template]):
        render(template, {})


def test_what_templates_do_right():
    tool = {"name": "f", "text": "<é & 東京>"}
    assert render("{{ tool | tojson }}", {"tool": tool}) == json.dumps(tool, ensure_ascii=False)
    assert render("{{ tool | tojson(indent=2, sort_keys=true) }}", {"tool": tool}) == json.dumps(
        tool, ensure_ascii=False, indent=2, sort_keys=True
    )
    assert render("{% for i in range(5) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", {}) == "012"
    assert render("a{% generation %}b{% endgeneration %}c", {}) == "abc"
    assert render("{{ strftime_now('%Y') }}", {}) == time.strftime("%Y")
    long = "x" * 3_000_000  # beyond a pipe's buffer
    assert render("{{ m }}{{ m }}", {"m": long}) == 2 * long


def test_variables_that_json_cannot_say():
    with pytest.raises(ValueError, match="must be what JSON can say"):
        render("{{ m }}", {"m": object()})


def test_threads_and_forks_have_answers_of_their_own():
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda i: render("{{ i }}", {"i": i}), range(100))) == [str(i) for i in range(100)]
    before = _worker._process
    context = multiprocessing.get_context("fork")
    results = context.Queue()

    def child():
        results.put([render("{{ i }}", {"i": i}) for i in range(20)])
        _worker.stop()

    process = context.Process(target=child)
    process.start()
    assert results.get(timeout=30) == [str(i) for i in range(20)]
    process.join(30)
    assert _worker._process is before and render("{{ 1 }}", {}) == "1"
