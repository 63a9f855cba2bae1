"""deploy/: files parse, name metrics, flags, routes and files that exist, and pass the checkers that are installed."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import foveate.cli

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
YAML = sorted(path.relative_to(DEPLOY).as_posix() for path in DEPLOY.rglob("*.y*ml"))
# What counts the windows themselves, and so is no number to be alarmed by.
COUNTS = {"foveate:reply_probed_tokens", "foveate:reply_window"}

served = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("prometheus_client", "fastapi")),
    reason="the extra `serve` is not installed",
)
yaml = pytest.importorskip("yaml")


def documents(name: str) -> list:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


def rules() -> list[dict]:
    return [rule for group in documents("prometheus/alerts.yml")[0]["groups"] for rule in group["rules"]]


def exported() -> set[str]:
    """All series of a server with one key, and one model that has not been loaded."""
    from prometheus_client.parser import text_string_to_metric_families

    from foveate.serve import ServerState, ServeSettings

    state = ServerState(ServeSettings(models={"m": "m"}, api_keys=("a-key-of-a-test",)), {"m": lambda: None})
    state.metrics.responses.labels("/", "200")
    families = text_string_to_metric_families(state.metrics.text().decode())
    return {sample.name for family in families for sample in family.samples}


def metrics_in(text: str) -> set[str]:
    return set(re.findall(r"\b(?:vllm:|foveate:|process_)\w+", text))


@pytest.mark.parametrize("name", YAML)
def test_yaml_parses(name):
    assert all(document for document in documents(name))


@served
def test_every_metric_is_exported():
    places = {
        "alerts": " ".join(rule["expr"] for rule in rules()),
        "dashboard": (DEPLOY / "grafana/foveate.json").read_text(),
        "autoscaling": documents("kubernetes/autoscaling.yaml")[0]["spec"]["triggers"][0]["metadata"]["query"],
    }
    known = exported()
    for place, text in places.items():
        assert metrics_in(text) and not metrics_in(text) - known, place
    assert metrics_in("foveate:no_such_metric > 0") - known


@served
def test_every_quality_metric_has_an_alert_and_a_panel():
    from foveate.serve.quality import EXPLAINED

    wanted = {f"foveate:{name}" for name in EXPLAINED} - COUNTS
    wanted |= {"foveate:canary_runs_total", "foveate:schema_failures_total", "foveate:feedback_total"}
    assert not wanted - metrics_in(" ".join(rule["expr"] for rule in rules()))
    assert not wanted - metrics_in((DEPLOY / "grafana/foveate.json").read_text())


def test_alerts_say_what_is_wrong():
    names = [rule["alert"] for rule in rules()]
    assert len(names) == len(set(names)) and all(re.fullmatch(r"[A-Z]\w+", name) for name in names)
    assert {rule["labels"]["severity"] for rule in rules()} == {"page", "ticket"}
    assert all(rule["annotations"]["summary"].endswith(".") for rule in rules())


def test_the_dashboard_is_what_its_tool_writes():
    done = subprocess.run([sys.executable, "tools/grafana.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((DEPLOY / "grafana/foveate.json").read_text())
    assert len({panel["id"] for panel in found["panels"]}) == len(found["panels"]) > 20


def test_flags_routes_and_files_exist(capsys):
    with pytest.raises(SystemExit):
        foveate.cli.main(["serve", "--help"])
    known = set(re.findall(r"--[a-z][\w-]+", capsys.readouterr().out))
    [unit] = re.findall(r"^ExecStart=(.*)$", (DEPLOY / "systemd/foveate.service").read_text(), re.MULTILINE)
    pod = documents("kubernetes/foveate.yaml")[0]["spec"]["template"]["spec"]
    compose = documents("compose.yaml")[0]
    files = {name: (DEPLOY / "docker" / name).read_text() for name in ("cpu.Dockerfile", "cuda.Dockerfile")}
    entries = re.findall(r"^(?:ENTRYPOINT|CMD) (\[.*\])$", "\n".join(files.values()), re.MULTILINE)
    given = [unit, *pod["containers"][0]["args"], *compose["services"]["foveate"]["command"], *entries]
    used = set(re.findall(r"--[a-z][\w-]+", " ".join(given)))
    assert {"--model", "--host", "--api-key-file", "--drain-timeout"} <= used <= known
    probes = [pod["containers"][0][f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")]
    assert probes == ["/health", "/ready", "/health"]
    for name, text in files.items():
        copied = [
            source for line in re.findall(r"^COPY (?!--)(.*) \S+$", text, re.MULTILINE) for source in line.split()
        ]
        assert copied and all((ROOT / source).exists() for source in copied), name
        assert f"torch=={_pinned('torch')} " in text + " " or f"torch=={_pinned('torch')}\n" in text
    assert compose["services"]["foveate"]["build"]["dockerfile"] == "deploy/docker/cpu.Dockerfile"


def _pinned(package: str) -> str:
    [found] = re.findall(rf"^{package}==(\S+)", (ROOT / "requirements/demo.txt").read_text(), re.MULTILINE)
    return found


def test_whoever_stops_the_server_waits_for_its_drain():
    """Each grace period is longer than the drain that is asked for, and what comes before it."""

    def drain(text: str) -> int:
        return int(re.findall(r"--drain-timeout\W+(\d+)", text)[0])

    unit = (DEPLOY / "systemd/foveate.service").read_text()
    assert int(re.findall(r"TimeoutStopSec=(\d+)", unit)[0]) > drain(unit)
    pod = documents("kubernetes/foveate.yaml")[0]["spec"]["template"]["spec"]
    container = pod["containers"][0]
    before = int(container["lifecycle"]["preStop"]["exec"]["command"][-1])
    assert pod["terminationGracePeriodSeconds"] > before + drain(" ".join(container["args"]))
    service = documents("compose.yaml")[0]["services"]["foveate"]
    assert int(service["stop_grace_period"].rstrip("s")) > drain(" ".join(service["command"]))


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_the_unit_is_one(tmp_path):
    text = (DEPLOY / "systemd/foveate.service").read_text().replace("/opt/foveate/bin/foveate", "/bin/true")
    unit = tmp_path / "foveate.service"
    unit.write_text(text)
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
    assert "foveate.service" not in done.stderr, done.stderr  # what it says of this machine's other units is not ours
    unit.write_text(text.replace("DynamicUser=yes", "DynamicUser=perhaps"))
    assert (
        "foveate.service" in subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True).stderr
    )


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool, of the package prometheus, is not installed")
def test_promtool_takes_the_rules():
    done = subprocess.run(
        ["promtool", "check", "rules", DEPLOY / "prometheus/alerts.yml"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
