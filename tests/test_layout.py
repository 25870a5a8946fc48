"""Each source file has its own test file, at the same place."""

from __future__ import annotations

import pathlib

TOP = pathlib.Path(__file__).parent.parent
EXEMPT = {
    "userspace_proxy/__main__.py": "early, then one call of cli.main; test_early has it whole",
    "userspace_proxy/exceptions.py": "no behaviour of its own; raised and read by everybody's tests",
    "userspace_proxy/capture/base.py": "a contract without code",
    "userspace_proxy/sources/base.py": "a contract, and waiting for its first word, which test_cli does",
}
"""Files without a test file, and why. This list may only shrink."""


def mirror_of(source: str) -> pathlib.Path:
    folder, _, name = source.rpartition("/")
    return TOP / folder.replace("userspace_proxy", "tests", 1) / f"test_{name}"


def sources() -> set[str]:
    found = (TOP / "userspace_proxy").rglob("*.py")
    return {str(path.relative_to(TOP)) for path in found if path.name != "__init__.py"}


def test_each_source_file_has_its_test_file():
    missing = {source for source in sources() - set(EXEMPT) if not mirror_of(source).exists()}
    assert not missing, f"write {', '.join(str(mirror_of(source).relative_to(TOP)) for source in sorted(missing))}"


def test_no_exemption_is_left_over():
    left_over = {source for source in EXEMPT if source not in sources() or mirror_of(source).exists()}
    assert not left_over, f"these are gone or have a test file now: take {sorted(left_over)} out of EXEMPT"


def test_init_files_hold_no_code_to_test():
    for path in (TOP / "userspace_proxy").rglob("__init__.py"):
        assert not [line for line in path.read_text().splitlines() if line.startswith(("def ", "class ", "async "))]
