"""The file ``authsvc_app/__init__.py`` of an installation by pip, pipx or uv: the folder holds the whole service.

The command ``authsvc`` calls ``main``. Another server loads the WSGI callable as ``authsvc_app:app``.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the modules import each other by their names at the top

from authsvc import app, main

__all__ = ["app", "main"]
