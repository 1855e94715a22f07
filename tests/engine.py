"""A small container engine for the tests: buildah builds the image, and namespaces of Linux hold the containers.

Docker does not run on every machine that runs these tests. This engine needs root, and does what Docker does with the
options of deploy/compose.yaml: files of its own that are read-only, a user, no capabilities, and a network of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent
CONTAINERFILE = HERE / "deploy/Containerfile"
PROGRAMS = {"buildah": "buildah", "debootstrap": "debootstrap", "ip": "iproute2"}  # and Debian's package
# What an image is built from; a change of one of these files builds it again.
SOURCES = "*.py", "*.sql", "pyproject.toml", "LICENSE", "Makefile", "deploy/Containerfile", "deploy/*.py"
FOLDERS = "cli", "credentials", "engines", "mails", "tables", "web", "requirements"
RELEASE, BASE = "trixie", "docker.io/library/debian:13-slim"
MIRROR = "http://deb.debian.org/debian"
MAX_AGE = 30 * 86_400  # seconds for which a base is kept
UNUSED_AGE = 86_400  # seconds for which an image is kept: another process may be using it
MEMORY = 3 * 2**30  # bytes that a build needs at most
SHELLS = "sh", "dash", "bash", "rbash"

LIBC = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNET = 0x40000000
PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 24, 38
CAPABILITIES = {"NET_BIND_SERVICE": 10}


def missing() -> str:
    """Return why no container can be started here, or an empty text."""
    if os.geteuid():
        return "only root may build an image and mount its files"
    absent = {package for name, package in PROGRAMS.items() if not shutil.which(name)}
    return f"{', '.join(sorted(absent))} is missing: apt-get install {' '.join(sorted(absent))}" if absent else ""


# The image


@dataclass(frozen=True)
class Image:
    """An image: the folder with its files, its configuration, and the compressed size of each layer in bytes."""

    files: Path
    config: dict[str, Any]
    layers: list[int]

    @property
    def environ(self) -> dict[str, str]:
        return dict(line.split("=", 1) for line in self.config["Env"])


def build_image() -> Image:
    """Return the image that deploy/Containerfile describes. It is kept until a file that it is built from changes."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "authsvc-tests"
    cache.mkdir(parents=True, exist_ok=True)
    image = cache / f"image-{_digest()}"
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be building it
        if not image.exists():
            # In a namespace of its own, so that what it mounts goes away with it.
            run("unshare", "--mount", sys.executable, __file__, "build", str(cache), str(image))
    found = json.loads((image / "image.json").read_text())
    return Image(image / "files", found["config"], found["layers"])


def _build(cache: Path, image: Path) -> None:
    """Build an image in a cache, in memory where there is enough: it writes and deletes many files."""
    for former in cache.glob("image-*"):
        if time.time() - former.stat().st_mtime > UNUSED_AGE:
            shutil.rmtree(former)
    with tempfile.TemporaryDirectory(prefix="build-", dir=cache) as name:
        folder = Path(name)
        found = re.search(r"^MemAvailable: *([0-9]+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
        in_memory = found and int(found[1]) * 1024 > 2 * MEMORY
        if in_memory:
            run("mount", "-t", "tmpfs", "-o", f"size={MEMORY}", "tmpfs", name)
        try:
            base = cache / f"{RELEASE}.tar"
            if not base.exists() or time.time() - base.stat().st_mtime > MAX_AGE:
                _move(_make_base(folder), base)
            _move(_run_containerfile(base, folder), image)
        finally:
            if in_memory:
                run("umount", "--lazy", name)


def _move(source: Path, target: Path) -> None:
    """Move a file or folder to the cache, where it appears only when it is complete."""
    run("cp", "--archive", str(source), f"{target}.new")
    Path(f"{target}.new").rename(target)


def _digest() -> str:
    paths = [path for pattern in SOURCES for path in HERE.glob(pattern)]
    paths += [path for name in FOLDERS for path in (HERE / name).rglob("*") if "__pycache__" not in path.parts]
    content = hashlib.sha256()
    for path in sorted(path for path in paths if path.is_file()):
        content.update(f"{path.relative_to(HERE)}\0".encode() + path.read_bytes())
    return content.hexdigest()[:16]


def _make_base(folder: Path) -> Path:
    """Return an archive with the files of a small Debian. The image of Docker's registry is made in the same way."""
    files, archive = folder / "files", folder / "base.tar"
    run("debootstrap", "--variant=minbase", RELEASE, str(files), MIRROR)
    # As in the slim image: no documents, no archives of packages, and no waiting for the disk.
    excluded = "".join(f"path-exclude /usr/share/{name}/*\n" for name in ("doc", "man", "locale", "info"))
    (files / "etc/dpkg/dpkg.cfg.d/docker").write_text(f"{excluded}force-unsafe-io\n")
    (files / "etc/apt/apt.conf.d/docker-clean").write_text(
        'DPkg::Post-Invoke { "rm -f /var/cache/apt/archives/*.deb"; };\n'
        'Dir::Cache::pkgcache ""; Dir::Cache::srcpkgcache "";\n'
    )
    unwanted = [f"--exclude=./var/{name}" for name in ("cache/apt/archives/*.deb", "lib/apt/lists/*")]
    run("tar", "-C", str(files), *unwanted, "-cf", str(archive), ".")
    shutil.rmtree(files)
    return archive


def _run_containerfile(base: Path, folder: Path) -> Path:
    """Build the image on a base; return a folder with its files and its description."""
    built = folder / "built"
    built.mkdir()

    def buildah(*arguments: str) -> str:
        stored = "--root", str(folder / "storage"), "--runroot", str(folder / "run"), "--storage-driver", "vfs"
        return run("buildah", *stored, *arguments)

    container = buildah("from", "scratch").strip()
    buildah("add", container, str(base), "/")
    buildah("commit", "--rm", container, BASE)
    # The build uses the index of packages and the certificate authorities of this machine.
    (folder / "pip.conf").write_text(f"[global]\ncert = /run/authorities.crt\n{_index()}")
    buildah(
        *("build", "--format", "docker", "--isolation", "chroot", "--tag", "authsvc"),
        *("--volume", f"{folder}/pip.conf:/etc/pip.conf:ro", "--volume", f"{_authorities()}:/run/authorities.crt:ro"),
        *("--ulimit", "nproc=8192:8192", "--ulimit", "nofile=1024:1024"),  # not each root may raise the limits
        *("--file", str(CONTAINERFILE), str(HERE)),
    )
    buildah("push", "authsvc", f"oci:{folder}/pushed")
    container = buildah("from", "authsvc").strip()
    Path(buildah("mount", container).strip()).rename(built / "files")
    [manifest] = json.loads((folder / "pushed/index.json").read_text())["manifests"]
    described = json.loads((folder / "pushed/blobs/sha256" / manifest["digest"].removeprefix("sha256:")).read_text())
    image = {
        "config": json.loads(buildah("inspect", "--type", "image", "authsvc"))["Docker"]["config"],
        "layers": [layer["size"] for layer in described["layers"]],
    }
    (built / "image.json").write_text(json.dumps(image))
    return built


def _authorities() -> str:
    return os.environ.get("PIP_CERT") or "/etc/ssl/certs/ca-certificates.crt"


def _index() -> str:
    return f"index-url = {os.environ['PIP_INDEX_URL']}\n" if "PIP_INDEX_URL" in os.environ else ""


def run(*command: str) -> str:
    """Run a program and return its output."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, (command, done.stdout[-4000:], done.stderr[-4000:])
    return done.stdout


# Containers


@dataclass
class Container:
    """A container. It starts at once, except where it waits for ``release``, until networks are connected.

    Args:
        image: the image with the files.
        folder: an empty folder for the log and for the mounts.
        command: the program and its arguments.
        environ: the whole environment.
        user: "UID", "UID:GID" or "" for root. A user without a name has group 0.
        mounts: path in the container: path on this machine.
        temporary: folders in the container that are empty and writable.
        kept: capabilities of root.
        removed: files of the image that are deleted.
    """

    image: Image
    folder: Path
    command: Sequence[str]
    environ: Mapping[str, str] = field(default_factory=dict)
    user: str = ""
    workdir: str = "/"
    mounts: Mapping[str, str] = field(default_factory=dict)
    temporary: Sequence[str] = ("/tmp",)
    kept: Sequence[str] = ()
    removed: Sequence[str] = tuple(f"/usr/bin/{name}" for name in SHELLS)
    waits: bool = False

    def __post_init__(self) -> None:
        (self.folder / "mounted").mkdir(parents=True)
        uid, _, gid = (self.user or "0").partition(":")
        entries = [line.split(":") for line in (self.image.files / "etc/passwd").read_text().splitlines()]
        self.uid = int(uid)
        self.gid = int(gid or next((entry[3] for entry in entries if entry[2] == uid), 0))
        described = {
            "files": str(self.image.files),
            "folder": str(self.folder / "mounted"),
            "uid": self.uid,
            "gid": self.gid,
            **{
                name: getattr(self, name)
                for name in ("command", "environ", "workdir", "mounts", "temporary", "removed")
            },
            "kept": [CAPABILITIES[name] for name in self.kept],
        }
        namespaces = "--mount", "--pid", "--ipc", "--uts", "--net"
        with (self.folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [
                    "unshare",
                    *namespaces,
                    "--fork",
                    "--kill-child",
                    sys.executable,
                    "-IS",
                    __file__,
                    "enter",
                    json.dumps(described),
                ],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
            )
        if not self.waits:
            self.release()

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    @property
    def pid(self) -> int:
        """The number of its first process, as this machine sees it."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        while self.process.poll() is None:
            if found := children.read_text().split():
                return int(found[0])
            time.sleep(0.001)
        raise AssertionError(self.log)

    def release(self) -> None:
        """Start its program."""
        assert self.process.stdin
        self.started_at = time.monotonic()
        self.process.stdin.close()

    def execute(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a further program in it, as "docker exec" does."""
        # Its own program may not run yet. While a process becomes another program, its command line is empty.
        while not (line := Path(f"/proc/{self.pid}/cmdline").read_bytes()) or b"engine.py" in line:
            time.sleep(0.001)
        spaces = "--mount", "--pid", "--ipc", "--uts", "--net", "--root", "--wd"
        user = f"--setuid={self.uid}", f"--setgid={self.gid}"
        return subprocess.run(
            ["nsenter", f"--target={self.pid}", *spaces, *user, *command],
            env=dict(self.environ),
            capture_output=True,
            text=True,
            timeout=60,
        )

    def request(
        self, method: str, path: str, form: str = "", headers: Mapping[str, str] = {}
    ) -> tuple[int, dict[str, Any]]:
        """Send a request to port 5000 from inside its network; return the status and the JSON of the answer."""
        with inside_network(self.pid):
            connection = http.client.HTTPConnection("127.0.0.1", 5000, timeout=30)
            connection.connect()
        with contextlib.closing(connection):
            content_type = {"Content-Type": "application/x-www-form-urlencoded"} if form else {}
            connection.request(method, path, form or None, {**content_type, **headers})
            response = connection.getresponse()
            return response.status, json.loads(response.read())

    def wait_for_health(self, timeout: float = 30) -> float:
        """Wait for the answer 200 of /health; return the seconds since the start."""
        while time.monotonic() - self.started_at < timeout and self.process.poll() is None:
            with contextlib.suppress(OSError):
                if self.request("GET", "/health")[0] == 200:
                    return time.monotonic() - self.started_at
            time.sleep(0.005)
        raise AssertionError(self.log)

    def wait(self) -> int:
        """Wait for its end; return the exit code."""
        return self.process.wait(30)

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal to its first process, and wait for the end; return the exit code."""
        if self.process.poll() is None:
            os.kill(self.pid, number)
        return self.wait()

    def close(self) -> None:
        """Kill whatever still runs in it."""
        self.release()
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def inside_network(pid: int) -> Iterator[None]:
    """Let this thread open sockets in the network of a process."""
    with open("/proc/thread-self/ns/net") as own, open(f"/proc/{pid}/ns/net") as other:
        assert LIBC.setns(other.fileno(), CLONE_NEWNET) == 0
        try:
            yield
        finally:
            assert LIBC.setns(own.fileno(), CLONE_NEWNET) == 0


def connect_networks(first: tuple[int, str], second: tuple[int, str], name: str) -> None:
    """Connect two processes by a network. Each is given as its number and its address, such as 10.0.0.2/24."""
    ends = [("netns", str(pid)) for pid, _ in (first, second)]
    run("ip", "link", "add", name, *ends[0], "type", "veth", "peer", "name", name, *ends[1])
    for pid, address in (first, second):
        inside = "nsenter", f"--net=/proc/{pid}/ns/net", "ip"
        run(*inside, "address", "add", address, "dev", name)
        run(*inside, "link", "set", name, "up")


def _enter(described: dict[str, Any]) -> None:
    """Mount the files of a container, and become its program. This runs in new namespaces."""
    folder, mounted = Path(described["folder"]), Path(described["folder"], "root")

    def mount(*arguments: object) -> None:
        subprocess.run(["mount", *map(str, arguments)], check=True)

    # The files of the image stay as they are. What the engine adds to them is in memory.
    mount("-t", "tmpfs", "tmpfs", folder)
    for name in ("changed", "work", "root"):
        (folder / name).mkdir()
    layers = f"lowerdir={described['files']},upperdir={folder}/changed,workdir={folder}/work"
    mount("-t", "overlay", "overlay", "-o", layers, mounted)
    for path in described["removed"]:
        (mounted / path.lstrip("/")).unlink(missing_ok=True)
    mount("-t", "proc", "proc", mounted / "proc")
    mount("--rbind", "/dev", mounted / "dev")
    for path, source in described["mounts"].items():
        target = mounted / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.mkdir(exist_ok=True) if Path(source).is_dir() else target.touch()
        mount("--bind", source, target)
    for path in described["temporary"]:
        (mounted / path.lstrip("/")).mkdir(parents=True, exist_ok=True)
        mount("-t", "tmpfs", "-o", "mode=1777", "tmpfs", mounted / path.lstrip("/"))
    mount("-o", "remount,bind,ro", mounted)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    sys.stdin.read()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chroot(mounted)
    os.chdir(described["workdir"])
    for number in range(int(Path("/proc/sys/kernel/cap_last_cap").read_text()) + 1):
        if number not in described["kept"]:
            LIBC.prctl(PR_CAPBSET_DROP, number, 0, 0, 0)
    os.setgroups([])
    os.setgid(described["gid"])
    os.setuid(described["uid"])
    LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    # End together with the program that started this one. Linux forgets this wish at a change of the user.
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    os.execvpe(described["command"][0], described["command"], described["environ"])


if __name__ == "__main__":
    if sys.argv[1] == "build":
        _build(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        _enter(json.loads(sys.argv[2]))
