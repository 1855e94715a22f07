"""What systemd offers: a socket that listens while the service restarts, and messages about its state."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from settings import SettingsError
from tests.conftest import Service, clean_environ
from tests.crowd import awaited
from tests.ports import fixed_port
from tests.restarts import PASS, ActivatedService, Load
from web import systemd

RESTARTS = 4


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as one:
        yield one


@pytest.fixture
def passed(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process has got the socket, under another number than that of systemd, which may be taken."""
    monkeypatch.setattr(systemd, "FIRST_DESCRIPTOR", os.dup(listener.fileno()))
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    monkeypatch.setenv("LISTEN_FDS", "1")


@pytest.mark.usefixtures("passed")
def test_a_passed_socket_is_used(listener: socket.socket) -> None:
    found = systemd.passed_socket()
    assert found
    with found:
        assert found.getsockname() == listener.getsockname()


@pytest.mark.usefixtures("passed")
@pytest.mark.parametrize("pid", ["", "1", None])
def test_a_socket_for_another_process_is_not_used(pid: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if pid is None:
        monkeypatch.delenv("LISTEN_PID")
    else:
        monkeypatch.setenv("LISTEN_PID", pid)
    assert systemd.passed_socket() is None


@pytest.mark.usefixtures("passed")
@pytest.mark.parametrize("count", ["0", "2", "", None])
def test_another_number_of_sockets_is_refused(count: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if count is None:
        monkeypatch.delenv("LISTEN_FDS")
    else:
        monkeypatch.setenv("LISTEN_FDS", count)
    with pytest.raises(SettingsError, match="one ListenStream= with address and port"):
        systemd.passed_socket()


@pytest.mark.usefixtures("passed")
@pytest.mark.parametrize("kind", ["unix", "connection"])
def test_another_kind_of_socket_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if kind == "unix":
        other = socket.socket(socket.AF_UNIX)
        other.bind(str(tmp_path / "socket"))
        other.listen()
    else:
        other = socket.socket()
    monkeypatch.setattr(systemd, "FIRST_DESCRIPTOR", other.detach())
    with pytest.raises(SettingsError, match="one ListenStream= with address and port"):
        systemd.passed_socket()


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_told(abstract: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = f"@authsvc-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemds:
        systemds.bind(path.replace("@", "\0"))
        monkeypatch.setenv("NOTIFY_SOCKET", path)
        systemd.notify("READY=1")
        systemds.settimeout(5)
        assert systemds.recv(100) == b"READY=1"


@pytest.mark.parametrize("path", [None, "", "/nonexistent/notify"])
def test_a_service_that_nobody_listens_to_goes_on(path: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if path is None:
        monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    else:
        monkeypatch.setenv("NOTIFY_SOCKET", path)
    systemd.notify("READY=1")


# Real services


@pytest.fixture
def activated(tmp_path: Path, listener: socket.socket) -> Iterator[ActivatedService]:
    service = ActivatedService(tmp_path, listener)
    yield service
    service.end()


@pytest.mark.process
def test_the_address_of_the_socket_counts(activated: ActivatedService, listener: socket.socket) -> None:
    activated.end()
    activated.environ["AUTHSVC_LISTEN"] = "127.0.0.1:1"  # a port that only root can listen on
    activated.start()
    assert activated.url == f"http://127.0.0.1:{listener.getsockname()[1]}"
    assert requests.get(f"{activated.url}/health", timeout=10).status_code == 200


@pytest.mark.process
def test_a_development_service_refuses_a_socket_that_other_machines_reach(tmp_path: Path) -> None:
    with socket.create_server(("0.0.0.0", 0)) as public:
        port, command = public.getsockname()[1], [sys.executable, "-c", PASS, str(public.fileno()), *Service.program]
        database = str(tmp_path / "authsvc.db")
        environ = {**clean_environ(), "AUTHSVC_LISTEN": "127.0.0.1:0", "AUTHSVC_DATABASE": database}
        refused = subprocess.run(
            command, env=environ, capture_output=True, text=True, pass_fds=(public.fileno(),), timeout=20
        )
    assert refused.returncode == 2
    assert f"AUTHSVC_LISTEN=0.0.0.0:{port}" in refused.stderr
    assert not Path(database).exists()


@pytest.mark.process
def test_systemd_is_told_of_the_start_each_second_and_of_the_end(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemds:
        systemds.bind(str(tmp_path / "notify"))
        systemds.settimeout(10)
        service = Service(tmp_path, NOTIFY_SOCKET=str(tmp_path / "notify"))
        try:
            assert systemds.recv(100) == b"READY=1"
            assert requests.get(f"{service.url}/health", timeout=10).status_code == 200
            assert [systemds.recv(100) for _ in range(2)] == [b"WATCHDOG=1"] * 2
        finally:
            assert service.end() == 0
        systemds.settimeout(1)
        while (message := systemds.recv(100)) == b"WATCHDOG=1":
            pass
        assert message == b"STOPPING=1"


@pytest.mark.process
def test_a_connection_waits_while_nobody_serves(activated: ActivatedService, listener: socket.socket) -> None:
    activated.end()
    with socket.create_connection(listener.getsockname()) as waiting:
        waiting.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        activated.start()
        waiting.settimeout(10)
        assert waiting.recv(1000).startswith(b"HTTP/1.1 200 ")


@pytest.mark.process
@pytest.mark.slow
def test_no_request_fails_while_the_service_restarts(activated: ActivatedService) -> None:
    load = Load(activated.address, checks=200, logins=4)
    load.create_users()
    with load.running():
        for _ in range(RESTARTS):
            time.sleep(0.2)
            assert activated.end() == 0
            activated.start()
        time.sleep(0.2)
    load.check()
    assert len(load.sessions) > RESTARTS  # tests/long/test_restarts.py counts and measures more


@pytest.mark.process
@pytest.mark.skipif(not shutil.which("systemd-socket-activate"), reason="needs systemd")
def test_systemd_activates_the_service(tmp_path: Path) -> None:
    port = fixed_port()
    names = "AUTHSVC_LISTEN", "AUTHSVC_DATABASE"
    environ = {**clean_environ(), names[0]: "127.0.0.1:0", names[1]: str(tmp_path / "authsvc.db")}
    passed = [option for name in (*names, "PATH") for option in ("-E", name)]
    command = ["systemd-socket-activate", "-l", f"127.0.0.1:{port}", *passed, *Service.program]
    with subprocess.Popen(command, env=environ, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        try:
            assert awaited(lambda: _status(port) == 200, 20)
        finally:
            process.send_signal(signal.SIGTERM)  # it has become the service
    assert process.returncode == 0


def _status(port: int) -> int:
    try:
        return requests.get(f"http://127.0.0.1:{port}/health", timeout=10).status_code
    except requests.ConnectionError:
        return 0
