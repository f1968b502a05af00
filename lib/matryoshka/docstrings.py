"""Question-and-answer pairs from the documentation of installed Python packages.

A real corpus that is on every machine that can run this project: each docstring that has a summary and a body gives one
pair. The summary is the query, the body without its summary is the document. Sources are parsed, never imported.
"""

import ast
import inspect
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MIN_BODY_CHARS = 80

_SKIPPED_FOLDERS = frozenset({"__pycache__", "site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"})


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One Python file: where it is, the dotted module that it defines, and the top-level package that owns it."""

    path: str
    module: str
    package: str


@dataclass(frozen=True, slots=True)
class DocstringPair:
    """One docstring, cut in two: ``query`` (its summary) and ``document`` (its body, without the summary)."""

    id: str
    package: str
    query: str
    document: str


def find_sources() -> list[SourceFile]:
    """Returns every Python file of the standard library and of the installed packages, in a stable order."""
    paths = sysconfig.get_paths()
    roots = list(dict.fromkeys(Path(paths[name]).resolve() for name in ("stdlib", "platlib", "purelib")))
    return sorted((source for root in roots for source in _walk(root)), key=lambda source: (source.module, source.path))


def _walk(root: Path) -> Iterator[SourceFile]:
    for top in sorted(root.iterdir()):
        if top.name.startswith((".", "_distutils")) or top.name in _SKIPPED_FOLDERS:
            continue
        files = sorted(top.rglob("*.py")) if top.is_dir() else [top] if top.suffix == ".py" else []
        for file in files:
            parts = file.relative_to(root).with_suffix("").parts
            if file.is_file() and _SKIPPED_FOLDERS.isdisjoint(parts) and all(part.isidentifier() for part in parts):
                module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
                yield SourceFile(str(file), module, parts[0])


def extract_pairs(source: SourceFile) -> list[DocstringPair]:
    """Returns the pairs of one file: of its module, classes and functions, public ones and not.

    A file that Python itself could not compile (templates, other versions' syntax) has no documentation and gives none.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(Path(source.path).read_bytes())
    except (SyntaxError, ValueError, RecursionError, OSError):
        return []
    pairs: dict[str, DocstringPair] = {}
    for name, node in _documented_nodes(tree, source.module):
        pair = split_docstring(ast.get_docstring(node, clean=False) or "")
        if pair:
            pairs.setdefault(name, DocstringPair(name, source.package, *pair))
    return list(pairs.values())


_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _documented_nodes(tree: ast.Module, module: str) -> Iterator[tuple[str, _Documented]]:
    stack: list[tuple[str, ast.AST]] = [(module, tree)]
    while stack:
        name, node = stack.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield name, node
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.stmt):
                own = getattr(child, "name", None)
                stack.append((f"{name}.{own}" if own else name, child))


def split_docstring(docstring: str) -> tuple[str, str] | None:
    r"""Returns (summary, body) of a docstring, or None where it has no summary or a body under 80 characters.

    >>> split_docstring("Add two numbers.\n\n" + "Both are converted to float first. " * 3)[0]
    'Add two numbers.'
    >>> split_docstring("Add two numbers.") is None
    True
    """
    summary, _, body = inspect.cleandoc(docstring).partition("\n\n")
    summary, body = " ".join(summary.split()), body.strip()
    if any("\ud800" <= character <= "\udfff" for character in docstring):
        return None  # half a surrogate pair, which no file can hold as text
    return (summary, body) if summary and len(body) >= MIN_BODY_CHARS else None
