"""The first code of the one-file build: unpack the file, delete what older files have unpacked, start the program.

"make pyz" puts it into the file in the place of shiv's own first code.
"""

import os
import shutil
import sys
from contextlib import suppress

import _bootstrap
from _bootstrap.environment import Environment

BUILT_FOR = "site-packages/PYTHON"  # in a file with compiled parts: the version of Python that they are for
KEPT = 2  # unpacked files: this one, and the one from which a service may still be running

with _bootstrap.current_zipfile() as archive:
    if BUILT_FOR in archive.namelist():
        built_for, present = archive.read(BUILT_FOR).decode().strip(), f"{sys.version_info[0]}.{sys.version_info[1]}"
        if built_for != present:
            print(f"authsvc: this file is for Python {built_for}, this is {present}: build it again", file=sys.stderr)
            sys.exit(2)
    environment = Environment.from_json(archive.read("environment.json").decode())
    root = environment.root or "~/.shiv"
    try:
        release = _bootstrap.cache_path(archive, environment.root, environment.build_id)
        new = not release.exists()
        if new:
            _bootstrap.extract_site_packages(archive, release, environment.compile_pyc, environment.compile_workers)
    except (OSError, RuntimeError) as error:  # RuntimeError: this user has no home folder
        remedy = "set SHIV_ROOT to a folder that only this user can write to"
        print(f"authsvc: cannot unpack into {root}: {getattr(error, 'strerror', error)}: {remedy}", file=sys.stderr)
        sys.exit(2)

with suppress(OSError):  # such as a folder that only root can write to
    os.utime(release)
    if new:
        prefix = release.name.removesuffix(environment.build_id)
        unpacked = [path for path in release.parent.iterdir() if path.name.startswith(prefix)]
        for path in sorted(unpacked, key=lambda path: path.stat().st_mtime)[:-KEPT]:
            shutil.rmtree(path)
            path.with_name(f".{path.name}_lock").unlink()

try:
    _bootstrap.bootstrap()
except ImportError as error:
    remedy = "set SHIV_ROOT to another folder if this one is mounted with noexec"
    print(f"authsvc: cannot run from {root}: {error}: {remedy}", file=sys.stderr)
    sys.exit(2)
