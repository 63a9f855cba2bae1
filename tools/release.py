"""The version of a release: typed once, in pyproject.toml; what else has to name it is checked here.

python tools/release.py                  prints the version
python tools/release.py --check v0.1.0   fails unless the tag, CITATION.cff and a dated section of CHANGELOG.md fit it
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def version(root: Path = ROOT) -> str:
    found = re.search(r'^version = "([^"]+)"', (root / "pyproject.toml").read_text(), re.MULTILINE)
    if found is None:
        raise ValueError('pyproject.toml has no line `version = "..."`')
    return found[1]


def faults(root: Path = ROOT, tag: str | None = None) -> list[str]:
    """What contradicts the version of pyproject.toml. With a tag also what a release must have."""
    current, out = version(root), []
    cited = re.search(r"^version: (.+)$", (root / "CITATION.cff").read_text(), re.MULTILINE)
    if cited is None or cited[1] != current:
        out.append(f"CITATION.cff has version {cited and cited[1]}, pyproject.toml {current}: change it there")
    newest = re.search(r"^## (\S+)(?:, (.+))?$", (root / "CHANGELOG.md").read_text(), re.MULTILINE)
    if newest is None or newest[1] != current:
        out.append(
            f"the first section of CHANGELOG.md is {newest and newest[1]}, pyproject.toml has {current}: begin one for it"
        )
    if tag is not None:
        if tag != f"v{current}":
            out.append(f"the tag is {tag}, pyproject.toml has {current}: the tag should be v{current}")
        if newest is not None and not re.fullmatch(r"\d{4}-\d\d-\d\d", newest[2] or ""):
            out.append(f"the section {newest[1]} of CHANGELOG.md has no date: write `## {current}, YYYY-MM-DD`")
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", metavar="TAG", help="a tag such as v0.1.0")
    args = parser.parse_args()
    if args.check is None:
        print(version())
        return 0
    found = faults(tag=args.check)
    print("\n".join(found), file=sys.stderr, end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
