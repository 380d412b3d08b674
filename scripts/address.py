"""Rewrite the public address of the repository wherever it stands: badges, set-up cells, citation.

python scripts/address.py owner/name

The address in force stands in pyproject.toml, [tool.binllm] address.
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import binllm_utils as bu


def main(new):
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]*/[A-Za-z0-9._-]+", new):
        sys.exit(f"{new!r} is not an address; say make address REPO=owner/name")
    old = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["binllm"]["address"]
    files = subprocess.run(["git", "-C", ROOT, "ls-files"], check=True, capture_output=True, text=True).stdout.split(
        "\n"
    )
    changed = 0
    for file in filter(None, files):
        path = ROOT / file
        if path.suffix not in (".md", ".ipynb", ".toml", ".cff", ".yml") or not path.exists():
            continue
        text = path.read_text(encoding="utf-8")
        renamed = text.replace(old, new)
        if path.suffix == ".ipynb":  # the folder that a clone makes, where it stands alone
            folder, renamed_folder = old.split("/")[1], new.split("/")[1]
            renamed = re.sub(rf'(?<![\w./-]){re.escape(folder)}(?=[/"\\])', renamed_folder, renamed)
        if renamed != text:
            with bu.replacing(path) as part:
                part.write_text(renamed, encoding="utf-8")
            changed += 1
    print(f"{old} -> {new}: {changed} files")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) == 2 else "")
