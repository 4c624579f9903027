"""Make the files of NiiVue in ``src/wmh_lora/assets/viewer``, from its npm package.

Run ``python tools/build_viewer.py`` for the version below, or name another one. Needs npm, which
checks the package against the registry's own checksum; nothing of the package is executed.

NiiVue's UMD build is taken as it is published. It is the smallest of its self-contained builds and
carries its dependencies, so their notices are collected as well.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

PACKAGE = "@niivue/niivue"
VERSION = "0.69.0"
SCRIPT = "dist/niivue.umd.js"
TARGET = Path(__file__).parents[1] / "src" / "wmh_lora" / "assets" / "viewer"

# The npm package names its licence, and leaves the text in the repository.
BSD_2_CLAUSE = """\
Copyright (c) 2021, Niivue
All rights reserved.

Redistribution and use in source and binary forms, with or without
modification, are permitted provided that the following conditions are met:

1. Redistributions of source code must retain the above copyright notice, this
   list of conditions and the following disclaimer.

2. Redistributions in binary form must reproduce the above copyright notice,
   this list of conditions and the following disclaimer in the documentation
   and/or other materials provided with the distribution.

THIS SOFTWARE IS PROVIDED BY THE COPYRIGHT HOLDERS AND CONTRIBUTORS "AS IS"
AND ANY EXPRESS OR IMPLIED WARRANTIES, INCLUDING, BUT NOT LIMITED TO, THE
IMPLIED WARRANTIES OF MERCHANTABILITY AND FITNESS FOR A PARTICULAR PURPOSE ARE
DISCLAIMED. IN NO EVENT SHALL THE COPYRIGHT HOLDER OR CONTRIBUTORS BE LIABLE
FOR ANY DIRECT, INDIRECT, INCIDENTAL, SPECIAL, EXEMPLARY, OR CONSEQUENTIAL
DAMAGES (INCLUDING, BUT NOT LIMITED TO, PROCUREMENT OF SUBSTITUTE GOODS OR
SERVICES; LOSS OF USE, DATA, OR PROFITS; OR BUSINESS INTERRUPTION) HOWEVER
CAUSED AND ON ANY THEORY OF LIABILITY, WHETHER IN CONTRACT, STRICT LIABILITY,
OR TORT (INCLUDING NEGLIGENCE OR OTHERWISE) ARISING IN ANY WAY OUT OF THE USE
OF THIS SOFTWARE, EVEN IF ADVISED OF THE POSSIBILITY OF SUCH DAMAGE.
"""


def main() -> None:
    """Fetch, check and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("version", nargs="?", default=VERSION)
    version = parser.parse_args().version
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "package.json").write_text("{}\n", encoding="utf-8")
        npm = ["npm", "install", "--ignore-scripts", "--omit=optional", f"{PACKAGE}@{version}"]
        subprocess.run(npm, cwd=folder, check=True)
        lock = json.loads((folder / "package-lock.json").read_text(encoding="utf-8"))
        entry = lock["packages"][f"node_modules/{PACKAGE}"]
        script = (folder / "node_modules" / PACKAGE / SCRIPT).read_bytes()
        notices = collect_notices(folder, lock["packages"])
    TARGET.mkdir(parents=True, exist_ok=True)
    packed = gzip.compress(script, 9, mtime=0)
    record = {
        "name": "NiiVue",
        "version": entry["version"],
        "licence": entry["license"],
        "package": f"npm:{PACKAGE}",
        "integrity": entry["integrity"],
        "file": SCRIPT,
        "bytes": len(script),
        "sha256": hashlib.sha256(script).hexdigest(),
    }
    (TARGET / "niivue.umd.js.gz").write_bytes(packed)
    (TARGET / "niivue.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (TARGET / "NOTICES.txt").write_text(notices, encoding="utf-8")


def collect_notices(folder: Path, packages: dict[str, Any]) -> str:
    """Put together the copyright lines and licence texts of NiiVue and what its build holds.

    Licences that several packages share are printed once.
    """
    texts: dict[str, str] = {}
    lines = []
    for place, entry in sorted(packages.items()):
        name = place.removeprefix("node_modules/")
        if not place or name == PACKAGE or entry.get("optional"):
            continue
        found = [path for path in (folder / place).iterdir() if path.stem.lower() == "license"]
        text = found[0].read_text(encoding="utf-8").strip()
        owners = [line.strip() for line in text.splitlines() if line.startswith("Copyright")]
        lines.append(f"{name} {entry['version']} ({entry['license']}): {'; '.join(owners)}")
        start = text.find("Permission ")
        texts.setdefault(entry["license"], text[start:])
    own = packages[f"node_modules/{PACKAGE}"]
    parts = [
        f"NiiVue {own['version']} ({own['license']})",
        BSD_2_CLAUSE.strip(),
        "The build of NiiVue holds these packages:",
        "\n".join(lines),
        "numcodecs holds compiled Blosc (BSD-3-Clause, Blosc Development Team),\n"
        "LZ4 (BSD-2-Clause, Yann Collet) and Zstandard (BSD-3-Clause, Meta Platforms).",
        *(f"{name}\n\n{text}" for name, text in sorted(texts.items())),
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
