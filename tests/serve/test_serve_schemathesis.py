"""Requests that schemathesis makes of our own OpenAPI description: none gives a 5xx, and what is refused has OpenAI's error object.

A tenth of FOVEATE_FUZZ_CASES, over all routes, and 150 at the least: `make fuzz` takes 2,000.
"""

from __future__ import annotations

import os

import pytest

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
pytestmark = [pytest.mark.fuzz, pytest.mark.filterwarnings("ignore")]  # warnings of its parts
CASES = max(150, int(os.environ.get("FOVEATE_FUZZ_CASES", "0")) // 10)


def test_no_request_gives_a_5xx(toy):
    import hypothesis

    schema = schemathesis.openapi.from_dict(toy.get("/openapi.json").json())
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) > 25
    seen: dict[int, int] = {}
    settings = hypothesis.settings(
        max_examples=max(1, CASES // len(operations)), deadline=None, database=None, derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck), phases=[hypothesis.Phase.generate],
    )  # fmt: skip
    for operation in operations:

        @settings
        @hypothesis.given(case=operation.as_strategy())
        def ask(case):
            found = case.call(base_url=toy.url, session=None)
            status = found.status_code
            seen[status] = seen.get(status, 0) + 1
            loading = status == 503 and found.json().get("status") == "waiting"
            assert status < 500 or loading, (case.method, case.path, case.body, found.text)
            if status >= 400 and case.path.startswith("/v1"):
                assert set(found.json()["error"]) == {"message", "type", "param", "code"}

        ask()
    assert {200, 400} <= set(seen) and sum(seen.values()) >= len(operations)
    toy.wait(toy.idle, 60)
    assert toy.text(prompt="x", max_tokens=1, ignore_eos=True, seed=1)
