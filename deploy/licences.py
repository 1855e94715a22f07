"""Print the licences of the packages that are named as arguments, from the metadata of their installation.

"make pyz" puts the output into the one-file build, as LICENCES.txt. A package without a licence ends the build.
"""

import re
import sys
from importlib.metadata import distribution
from pathlib import Path

for name in sys.argv[1:]:
    package = distribution(name)
    texts = [file for file in package.files or () if re.match("LICEN[CS]E|COPYING|NOTICE", file.name)]
    if not texts:
        sys.exit(f"{name} {package.version} has no file with its licence")
    for file in texts:
        text = Path(str(package.locate_file(file))).read_text(encoding="utf-8")
        print(f"{name} {package.version}, {file.name}\n\n{text}\n{'-' * 80}\n")
