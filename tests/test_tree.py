"""What no file of the tree may name, and what the lock has to be."""

import re

import pytest

from tests.tree import ROOT, tracked

FORBIDDEN = {
    "a package registry": re.compile(
        r"\bindex[-_]url\b|\bfind-links\b|https?://[^\s\")]*/simple\b"
        r"|\bpypi\.(?:org|python)|pythonhosted|\b(?:artifactory|devpi)\b",
        re.IGNORECASE,
    ),
    "a path of one machine": re.compile(
        r"(?<![\w.~$}])/(?:home|Users|root|work|workspace)/[\w.-]"
    ),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_names(what):
    bad = []
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # weights and images
        for number, line in enumerate(text.splitlines(), 1):
            if path.name != "test_tree.py" and FORBIDDEN[what].search(line):
                bad.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("a package registry", "pip install --extra-" + "index-url https://x"),
        ("a package registry", "https://mirror.example/api/simple"),
        ("a path of one machine", "open('/home/someone/data')"),
        ("a path of one machine", "/Users/someone"),
    ],
)
def test_the_patterns_find(what, line):
    assert FORBIDDEN[what].search(line)


def test_lock_is_public_hashed_and_without_torch():
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    entries = re.split(r"\n(?=\S)", text.strip())
    pins = [entry.split()[0] for entry in entries]
    assert "jax==0.11.2" in pins
    assert "://" not in text
    for entry, pin in zip(entries, pins, strict=True):
        assert re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", pin), pin
        assert "--hash=sha256:" in entry, pin
    assert not {pin.split("==")[0] for pin in pins} & {"torch", "torchvision"}


def test_every_target_of_the_makefile_is_there_once():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    assert phony
    rules = re.findall(r"^([a-z-]+):(?!=)", text, re.MULTILINE)
    assert sorted(rules) == sorted(phony[1].split())
