"""Metrics: what Prometheus is told, and who may ask."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

import authsvc
import log
from auth import Auth
from engines.errors import StorageUnavailable
from mail import Mailer
from settings import Settings, SettingsError
from tests.conftest import HERE, Client, Service
from tests.crowd import awaited
from tests.ports import fixed_port
from tests.production import PROXY, production_settings
from tests.routes import BOB
from web.metrics import BOUNDS, Histogram, Metrics

FILES = HERE / "deploy" / "prometheus"
CLASSES = "owner", "stranger", "unknown"
Samples = dict[str, float]  # by name and labels, as in Prometheus's text


def parsed(text: str) -> Samples:
    """Return the values of all samples in a text."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def scraped(service: Service) -> Samples:
    answer = requests.get(f"{service.url}/metrics", timeout=20)
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    return parsed(answer.text)


def change(service: Service, act: Callable[[], object]) -> Samples:
    """Return by how much each sample has grown after the act."""
    before = scraped(service)
    act()
    return {name: value - before.get(name, 0.0) for name, value in scraped(service).items()}


def text_of(metrics: Metrics) -> Samples:
    return parsed(metrics.text()[1].decode())


@pytest.mark.both_engines
def test_a_scrape_counts_requests_sign_ins_and_sessions(service: Service) -> None:
    def use() -> None:
        form = {"email": "metrics@x.io", "password": "b4l0u"}
        assert requests.post(f"{service.url}/users", form, timeout=20).status_code == 200
        assert requests.post(f"{service.url}/sessions", form, timeout=20).status_code == 200
        wrong = {**form, "password": "wrong"}
        assert [requests.post(f"{service.url}/sessions", wrong, timeout=20).status_code for _ in "12"] == [401] * 2
        for path in ("/verify", "/tokens/1", "/tokens/2", "/nowhere/1", "/nowhere/2"):
            requests.get(service.url + path, timeout=20)
        assert requests.head(f"{service.url}/health", timeout=20).status_code == 200

    grown = change(service, use)
    count = "authsvc_request_seconds_count{{method={},route={},status={}}}"
    assert grown[count.format("POST", "/users", 200)] == 1
    assert grown[count.format("POST", "/sessions", 200)] == 1
    assert grown[count.format("POST", "/sessions", 401)] == 2
    assert grown[count.format("GET", "/verify", 401)] == 1
    assert grown[count.format("GET", "/health", 200)] == 1
    assert grown[count.format("other", "other", 405)] == 2  # GET /tokens/1
    assert grown[count.format("other", "other", 404)] == 2
    assert grown["authsvc_sign_ins_total{outcome=success}"] == 1
    assert grown["authsvc_sign_ins_total{outcome=failed}"] == 2
    assert grown["authsvc_events_total{event=authn_login_fail}"] == 2
    # The class of a request depends on whether the thread of the one before is done yet.
    assert sum(grown[f"authsvc_hash_wait_seconds_count{{class={name}}}"] for name in CLASSES) == 4
    now = scraped(service)
    assert now["authsvc_database_up"] == 1
    assert now["authsvc_database_bytes"] > 50_000
    assert now["authsvc_connections"] >= 1
    assert now["process_resident_memory_bytes"] > 2**20
    assert any(name.startswith("authsvc_info{") and f"version={version()}" in name for name in now)
    # PostgreSQL tells the statistics of a table some time after a change.
    assert awaited(lambda: scraped(service)["authsvc_sessions"] >= 1)


def version() -> str:
    found = re.search('^version = "(.*)"', (HERE / "pyproject.toml").read_text(), re.MULTILINE)
    assert found
    return found[1]


def test_the_metrics_name_no_user_and_no_client(service: Service) -> None:
    form = {"email": "secret@x.io", "password": "b4l0u"}
    answer = requests.post(f"{service.url}/users", form, timeout=20)
    session = requests.post(f"{service.url}/sessions", form, timeout=20).cookies["session_id"]
    text = requests.get(f"{service.url}/metrics", timeout=20).text
    for private in ("secret", "127.0.0.1", session, answer.headers["X-Request-ID"]):
        assert private not in text


# Who may ask


@pytest.fixture(params=["development", "production"])
def application(request: pytest.FixtureRequest, auth: Auth, settings: Settings) -> Client:
    if request.param == "production":
        settings = production_settings(settings.database, trusted_proxy=PROXY)
    handlers = authsvc.Handlers(auth, settings, Metrics(authsvc.ALL_ROUTES))
    return Client(authsvc._application(handlers, settings))


def test_a_program_on_this_machine_is_answered(application: Client) -> None:
    answer = application("GET", "/metrics", REMOTE_ADDR="127.0.0.1", HTTP_HOST="127.0.0.1:5000")
    assert answer.status == 200
    assert b"authsvc_sign_ins_total" in answer.body


@pytest.mark.parametrize(
    "environ",
    [
        {"HTTP_X_FORWARDED_FOR": "192.0.2.1"},
        {"HTTP_X_FORWARDED_PROTO": "https"},
        {"HTTP_X_FORWARDED_HOST": "auth.example.com"},
        {"HTTP_FORWARDED": "for=192.0.2.1"},
        {"HTTP_VIA": "1.1 proxy"},
        {"HTTP_X_REAL_IP": "192.0.2.1"},
        {"HTTP_HOST": "auth.example.com"},  # a proxy that passes the name on, or DNS rebinding
    ],
    ids=lambda environ: "".join(environ),
)
def test_nobody_is_answered_through_a_proxy(application: Client, environ: dict[str, str]) -> None:
    direct: dict[str, Any] = {"REMOTE_ADDR": "127.0.0.1", "HTTP_HOST": "127.0.0.1"}
    answer = application("GET", "/metrics", **direct | environ)
    assert (answer.status, answer.json) == (404, {"message": "not found"})


def test_nobody_on_another_machine_is_answered(auth: Auth, settings: Settings) -> None:
    settings = production_settings(settings.database)
    handlers = authsvc.Handlers(auth, settings, Metrics(authsvc.ALL_ROUTES))
    call = Client(authsvc._application(handlers, settings))
    answer = call("GET", "/metrics", REMOTE_ADDR="192.0.2.1", HTTP_HOST="127.0.0.1")
    assert (answer.status, answer.json) == (404, {"message": "not found"})


def test_another_wsgi_server_has_no_metrics(call: Client) -> None:
    assert call("GET", "/metrics", REMOTE_ADDR="127.0.0.1").status == 404


def test_without_the_package_the_answer_names_it(application: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    answer = application("GET", "/metrics", REMOTE_ADDR="127.0.0.1", HTTP_HOST="localhost")
    assert answer.status == 404
    assert "pip install" in answer.json["message"]


# An address of its own


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "[::1]:{port}"])
def test_the_metrics_have_an_address_of_their_own(start: Callable[..., Service], address: str) -> None:
    listen = address.format(port=fixed_port())
    service = start(AUTHSVC_METRICS_LISTEN=listen)
    requests.get(f"{service.url}/health", timeout=20)
    answer = requests.get(f"http://{listen}/metrics", headers={"X-Forwarded-For": "192.0.2.1"}, timeout=20)
    assert answer.status_code == 200
    found = parsed(answer.text)
    assert found["authsvc_request_seconds_count{method=GET,route=/health,status=200}"] >= 1
    assert found["authsvc_database_up"] == 1
    assert service.end() == 0


def test_that_address_has_nothing_but_the_metrics(start: Callable[..., Service]) -> None:
    listen = f"127.0.0.1:{fixed_port()}"
    start(AUTHSVC_METRICS_LISTEN=listen)
    assert requests.post(f"http://{listen}/sessions", BOB, timeout=20).status_code == 405
    assert "Bienvenue" not in requests.get(f"http://{listen}/", timeout=20).text


def test_a_port_for_the_metrics_that_is_taken_stops_the_start(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        environ = {"AUTHSVC_LISTEN": "127.0.0.1:0", "AUTHSVC_METRICS_LISTEN": listen}
        done = subprocess.run(
            [sys.executable, HERE / "authsvc.py"], cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=60
        )
    assert done.returncode == 2
    assert done.stderr == f"authsvc: AUTHSVC_METRICS_LISTEN={listen}: address already in use\n"
    assert not list(tmp_path.iterdir())  # no database was made


@pytest.mark.parametrize("value", ["9464", "metrics.example.com:9464", "127.0.0.1:99999", "127.0.0.1"])
def test_a_malformed_address_for_the_metrics_is_refused(value: str) -> None:
    with pytest.raises(SettingsError, match=r"AUTHSVC_METRICS_LISTEN=.* must be ADDRESS:PORT"):
        Settings(metrics_listen=value)


def test_an_address_for_the_metrics_needs_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(SettingsError, match=r"AUTHSVC_METRICS_LISTEN.*pip install"):
        Metrics(authsvc.ALL_ROUTES).listen("127.0.0.1:0")


def watching(**parts: Any) -> Metrics:
    """Return metrics that describe a service whose server has these parts."""
    metrics = Metrics(authsvc.ALL_ROUTES)
    dispatcher = SimpleNamespace(waiting={"owner": 1, "stranger": 5}, waits=parts.get("waits", {}))
    server: Any = SimpleNamespace(connections=3, dispatcher=dispatcher)
    version = {"version": "1.2.3", "database": "SQLite 3"}
    metrics.watch(version, server, parts.get("figures", lambda: (2, 4096)), parts.get("mails", lambda: 0))
    return metrics


def test_the_queues_and_connections_are_told() -> None:
    waits = {"owner": Histogram()}
    for seconds in (0.004, 0.004, 0.2, 20.0):
        waits["owner"].observe(seconds)
    found = text_of(watching(waits=waits))
    assert found["authsvc_connections"] == 3
    assert (found["authsvc_hash_queue{class=owner}"], found["authsvc_hash_queue{class=stranger}"]) == (1, 5)
    bucket = "authsvc_hash_wait_seconds_bucket{{class=owner,le={}}}"
    assert [found[bucket.format(bound)] for bound in (*BOUNDS, "+Inf")] == [0, 0, 2, 2, 2, 3, 3, 3, 3, 4]
    assert found["authsvc_hash_wait_seconds_count{class=owner}"] == 4
    assert found["authsvc_hash_wait_seconds_sum{class=owner}"] == pytest.approx(20.208)
    assert found["authsvc_info{database=SQLite 3,version=1.2.3}"] == 1


@pytest.mark.both_engines
def test_sessions_and_size_are_those_of_the_database(auth: Auth, settings: Settings, database: str) -> None:
    auth.register_user(**BOB)
    for _ in range(3):
        auth.create_session(BOB["email"])
    sessions, size = auth.figures()
    assert size > 50_000
    assert sessions >= 0 if database.startswith("postgres") else sessions == 1  # one in development; there an estimate


def test_a_database_that_does_not_answer_hides_nothing_else() -> None:
    def fail() -> tuple[int, int]:
        raise StorageUnavailable("disk full")

    found = text_of(watching(figures=fail))
    assert found["authsvc_database_up"] == 0
    assert found["authsvc_connections"] == 3
    assert "authsvc_sessions" not in found


def test_mails_that_wait_or_failed_are_told() -> None:
    settings = Settings(smtp_url=f"smtp://127.0.0.1:{fixed_port()}", mail_from="a@x.io")  # nothing listens there
    mailer = Mailer(settings, log.log_event)
    metrics = watching(mails=mailer.waiting)
    before = text_of(metrics)
    assert before["authsvc_mails_waiting"] == 0
    mailer.enqueue(lambda: mailer.compose("reset", "bob@x.io", token="t"))
    assert awaited(lambda: text_of(metrics)["authsvc_events_total{event=mail_delayed}"] > 0)
    assert awaited(lambda: text_of(metrics)["authsvc_mails_waiting"] == 1)  # it is told before it waits again

    def crash() -> None:
        raise RuntimeError

    mailer.enqueue(crash)
    dropped = "authsvc_events_total{event=mail_dropped}"
    assert awaited(lambda: text_of(metrics)[dropped] == before[dropped] + 1)


def test_what_clients_make_up_adds_no_metric() -> None:
    metrics = Metrics(authsvc.ALL_ROUTES)
    for number in range(1000):
        metrics.observe("GET", f"/made-up/{number}", "404 Not Found", 0.0)
        metrics.observe(f"M{number}", "/users", "405 Method Not Allowed", 0.0)
        metrics.observe("DELETE", f"/tokens/{number}", "401 Unauthorized", 0.0)
    counts = {
        name: value for name, value in text_of(metrics).items() if name.startswith("authsvc_request_seconds_count")
    }
    assert counts == {
        "authsvc_request_seconds_count{method=other,route=other,status=404}": 1000,
        "authsvc_request_seconds_count{method=other,route=other,status=405}": 1000,
        "authsvc_request_seconds_count{method=DELETE,route=/tokens/*,status=401}": 1000,
    }


def test_events_are_counted_that_the_log_leaves_out(capsys: pytest.CaptureFixture[str]) -> None:
    before = log.counts["flood_of_a_test"]
    for _ in range(log.FLOOD_LIMIT + 50):
        log.log_event("flood_of_a_test")
    assert log.counts["flood_of_a_test"] - before == log.FLOOD_LIMIT + 50
    assert len(capsys.readouterr().err.splitlines()) == log.FLOOD_LIMIT


class SlowList(list[int]):
    """Lets another thread run between the reading and the writing of a number."""

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        time.sleep(1e-6)
        return found


def test_many_threads_lose_no_count() -> None:
    histogram = Histogram()
    histogram._counts = SlowList(histogram._counts)

    def observe() -> None:
        for _ in range(200):
            histogram.observe(0.01)

    threads = [threading.Thread(target=observe) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert histogram.read()[0][-1] == ("+Inf", 800)


@pytest.mark.process
def test_the_service_starts_without_the_package() -> None:
    code = "import sys, authsvc, web.server; sys.exit('prometheus_client' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=HERE, timeout=60).returncode == 0


# Prometheus


needs_promtool = pytest.mark.skipif(not shutil.which("promtool"), reason="needs promtool: apt-get install prometheus")


def run_promtool(*arguments: object, given: str = "") -> None:
    done = subprocess.run(["promtool", *map(str, arguments)], input=given, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr


@needs_promtool
@pytest.mark.process
@pytest.mark.slow
def test_the_text_is_well_formed(service: Service) -> None:
    run_promtool("check", "metrics", given=requests.get(f"{service.url}/metrics", timeout=20).text)


@needs_promtool
@pytest.mark.process
@pytest.mark.slow
def test_the_alerts_are_raised_when_they_should_be() -> None:
    run_promtool("check", "rules", FILES / "alerts.yml")
    run_promtool("test", "rules", HERE / "tests" / "alerts_test.yml")


@needs_promtool
@pytest.mark.process
@pytest.mark.slow
def test_the_dashboard_and_the_alerts_use_metrics_that_exist(service: Service, tmp_path: Path) -> None:
    dashboard = json.loads((FILES / "grafana.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(expressions) > 10
    rules = [
        {"record": f"panel:{n}", "expr": one.replace("$__rate_interval", "5m")} for n, one in enumerate(expressions)
    ]
    file = tmp_path / "rules.yml"  # JSON is YAML
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    run_promtool("check", "rules", file)
    text = "".join(expressions) + (FILES / "alerts.yml").read_text()
    requests.post(f"{service.url}/sessions", BOB, timeout=20)  # so that there is a histogram of requests
    told = {re.sub("[{].*", "", name) for name in scraped(service)}
    used = set(re.findall(r"\b(?:authsvc|process)_\w+", text))
    assert used <= told
