from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from matryoshka import docstrings
from matryoshka.docstrings import MIN_BODY_CHARS, SourceFile

BODY = "Long enough to say something about it, and to be worth an entry in a corpus of documents."
SOURCE = f'''"""Module.

{BODY}
"""
import os
raise RuntimeError("sources are parsed, never run")

class Outer:
    """Outer
    class.

    {BODY}

    And more.
    """

    def method(self):
        """Method.

        {BODY}
        """
        async def inner():
            """Inner.

            {BODY}
            """

    def short(self):
        """Short."""

if os.name:
    def chosen():
        """First.

        {BODY}
        """
else:
    def chosen():
        """Second.

        {BODY}
        """
'''


def extract(path: Path, content: bytes) -> list[docstrings.DocstringPair]:
    path.write_bytes(content)
    return docstrings.extract_pairs(SourceFile(str(path), "package.module", "package"))


def test_every_documented_thing_gives_one_pair_of_its_dotted_name(tmp_path: Path):
    found = {pair.id: pair for pair in extract(tmp_path / "module.py", SOURCE.encode())}
    names = ("", ".Outer", ".Outer.method", ".Outer.method.inner", ".chosen")
    assert sorted(found) == [f"package.module{name}" for name in names]
    assert found["package.module.Outer"].query == "Outer class."
    assert found["package.module.Outer"].document == f"{BODY}\n\nAnd more."
    assert {pair.package for pair in found.values()} == {"package"}


@pytest.mark.parametrize("content", [b"print 'Python 2'", b"def {{ template }}():", b"\xff\xfe", b"x = '\0'", b""])
def test_a_file_that_is_no_python_gives_nothing(tmp_path: Path, content: bytes):
    assert extract(tmp_path / "module.py", content) == []


@given(st.text("ab \n", max_size=20), st.text("ab \n", max_size=200))
def test_a_pair_has_a_summary_on_one_line_and_a_body_that_is_long_enough(summary: str, body: str):
    pair = docstrings.split_docstring(f"{summary}\n\n{body}")
    if pair:
        assert pair[0]
        assert pair[0] == " ".join(pair[0].split())
        assert len(pair[1]) >= MIN_BODY_CHARS
        assert pair[1] == pair[1].strip()


def test_the_least_body_is_kept_and_one_character_less_is_not():
    assert docstrings.split_docstring("Summary.\n\n" + "x" * MIN_BODY_CHARS) == ("Summary.", "x" * MIN_BODY_CHARS)
    assert docstrings.split_docstring("Summary.\n\n" + "x" * (MIN_BODY_CHARS - 1)) is None


def test_sources_are_those_of_the_standard_library_and_of_installed_packages():
    sources = docstrings.find_sources()
    by_module = {source.module: source for source in sources}
    assert Path(by_module["json.decoder"].path).is_file()
    assert by_module["numpy.linalg"].package == "numpy"
    assert not any("tests" in source.module.split(".") for source in sources)
    assert sources == docstrings.find_sources()


def test_half_a_surrogate_pair_and_a_file_that_cannot_be_read_give_nothing(tmp_path: Path):
    assert extract(tmp_path / "module.py", f'"""Summary \\ud800.\n\n{BODY}\n"""'.encode()) == []
    assert len(extract(tmp_path / "module.py", f'"""Summary \\U0001f600.\n\n{BODY}\n"""'.encode())) == 1
    assert docstrings.extract_pairs(SourceFile(str(tmp_path / "gone.py"), "package.gone", "package")) == []
