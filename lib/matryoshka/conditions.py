"""Conditions on the columns of documents: the part of SQL's WHERE that compares columns with constants.

    subreddit IN ('python', 'rust') AND (year BETWEEN 2020 AND 2024 OR score > 0.5) AND NOT title LIKE '%release%'

Keywords are read in any case, names of columns as they are written; double quotes make any text a name.
"""

import re
from dataclasses import dataclass, field
from typing import Literal

Constant = str | int | float | bool
Operator = Literal["=", "<>", "<", "<=", ">", ">="]

_MOST_NESTED = 50
_EXAMPLE = "Write for example subreddit = 'python' AND year >= 2020."
_KEYWORDS = {"and", "or", "not", "in", "between", "is", "null", "like", "true", "false"}
_TOKENS = re.compile(
    r"""\s*(?:
    (?P<text>'(?:[^']|'')*')
    | (?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)
    | (?P<quoted>"(?:[^"]|"")+")
    | (?P<name>[^\W\d]\w*)
    | (?P<operator><>|!=|<=|>=|[=<>])
    | (?P<mark>[(),])
    )""",
    re.VERBOSE,
)
_OPERATORS: dict[str, Operator] = {"!=": "<>", "=": "=", "<>": "<>", "<": "<", "<=": "<=", ">": ">", ">=": ">="}
_MIRRORED: dict[Operator, Operator] = {"=": "=", "<>": "<>", "<": ">", "<=": ">=", ">": "<", ">=": "<="}


@dataclass(frozen=True, slots=True)
class Comparison:
    """``column operator value``."""

    column: str
    operator: Operator
    value: Constant


@dataclass(frozen=True, slots=True)
class Membership:
    """``column IN (values)``."""

    column: str
    values: tuple[Constant, ...]


@dataclass(frozen=True, slots=True)
class Likeness:
    """``column LIKE pattern``: % stands for any text, _ for one character."""

    column: str
    pattern: str


@dataclass(frozen=True, slots=True)
class Absence:
    """``column IS NULL``."""

    column: str


@dataclass(frozen=True, slots=True)
class Negation:
    """``NOT term``."""

    term: "Term"


@dataclass(frozen=True, slots=True)
class Junction:
    """``AND`` or ``OR`` of terms."""

    kind: Literal["and", "or"]
    terms: tuple["Term", ...]


Term = Comparison | Membership | Likeness | Absence | Negation | Junction


@dataclass(frozen=True, slots=True)
class Condition:
    """A condition: what was written, and what it says."""

    text: str
    term: Term = field(compare=False)


def parse(text: str) -> Condition:
    """Returns the condition that a text says.

    Raises:
        ValueError: The text is not a condition; the place is named.

    >>> parse("year BETWEEN 2020 AND 2024").term
    Junction(kind='and', terms=(Comparison(column='year', operator='>=', value=2020), Comparison(column='year', operator='<=', value=2024)))
    """  # noqa: E501 - a line of output
    return Condition(text, _Parser(text).parse())


def leaves(term: Term) -> list[Comparison | Membership | Likeness | Absence]:
    """Returns the parts of a term that look at a column, in order."""
    if isinstance(term, Negation):
        return leaves(term.term)
    if isinstance(term, Junction):
        return [leaf for part in term.terms for leaf in leaves(part)]
    return [term]


@dataclass(frozen=True, slots=True)
class _Token:
    """A word of a condition: its kind, how it is written (keywords small), and where it begins, the first place being 1."""

    kind: str
    text: str
    place: int


def _tokens(text: str) -> list[_Token]:
    found, position, end = [], 0, len(text.rstrip())
    while position < end:
        match = _TOKENS.match(text, position)
        if not match or not match.lastgroup:
            place = position + len(text[position:]) - len(text[position:].lstrip()) + 1
            raise ValueError(f"--where: character {place} of {text!r} begins nothing that is known here. {_EXAMPLE}")
        kind, word = match.lastgroup, match[match.lastgroup]
        if kind == "name" and word.lower() in _KEYWORDS:
            kind, word = "keyword", word.lower()
        found.append(_Token(kind, word, match.start(match.lastgroup) + 1))
        position = match.end()
    return [*found, _Token("end", "the end", len(text) + 1)]


class _Parser:
    """Reads a condition from left to right: OR binds least, then AND, then NOT."""

    def __init__(self, text: str) -> None:
        self._text, self._tokens, self._next, self._depth = text, _tokens(text), 0, 0

    def parse(self) -> Term:
        """Returns the whole condition."""
        term = self._either()
        if self._peek().kind != "end":
            raise self._fault("AND, OR or the end")
        return term

    def _either(self) -> Term:
        self._depth += 1
        if self._depth > _MOST_NESTED:
            raise ValueError(f"--where: more than {_MOST_NESTED} levels of parentheses. Write it simpler.")
        terms = [self._both()]
        while self._take("or"):
            terms.append(self._both())
        self._depth -= 1
        return terms[0] if len(terms) == 1 else Junction("or", tuple(terms))

    def _both(self) -> Term:
        terms = [self._one()]
        while self._take("and"):
            terms.append(self._one())
        return terms[0] if len(terms) == 1 else Junction("and", tuple(terms))

    def _one(self) -> Term:
        num_negations = 0
        while self._take("not"):
            num_negations += 1
        if self._take("("):
            term = self._either()
            self._expect(")")
        else:
            term = self._leaf()
        return Negation(term) if num_negations % 2 else term

    def _leaf(self) -> Term:
        if self._peek().kind not in ("name", "quoted"):
            value = self._constant("a column")
            operator = self._operator("=, <>, <, <=, > or >=")
            return Comparison(self._column(), _MIRRORED[operator], value)
        column = self._column()
        if self._take("is"):
            is_negated = self._take("not")
            self._expect("null")
            return Negation(Absence(column)) if is_negated else Absence(column)
        is_negated = self._take("not")
        term = self._predicate(column, is_negated=is_negated)
        return Negation(term) if is_negated else term

    def _predicate(self, column: str, *, is_negated: bool) -> Term:
        if self._take("in"):
            self._expect("(")
            values = [self._constant("a constant")]
            while self._take(","):
                values.append(self._constant("a constant"))
            self._expect(")")
            return Membership(column, tuple(values))
        if self._take("between"):
            low = self._constant("a constant")
            self._expect("and")
            return Junction("and", (Comparison(column, ">=", low), Comparison(column, "<=", self._constant("a constant"))))
        if self._take("like"):
            pattern = self._peek()
            if pattern.kind != "text":
                raise self._fault("a pattern in single quotes")
            return Likeness(column, str(self._constant("a pattern")))
        if is_negated:
            raise self._fault("IN, BETWEEN or LIKE")
        return Comparison(column, self._operator("=, <>, <, <=, >, >=, IN, BETWEEN, LIKE or IS"), self._constant("a constant"))

    def _column(self) -> str:
        token = self._peek()
        if token.kind not in ("name", "quoted"):
            raise self._fault("a column")
        self._next += 1
        return token.text if token.kind == "name" else token.text[1:-1].replace('""', '"')

    def _operator(self, expected: str) -> Operator:
        token = self._peek()
        if token.kind != "operator":
            raise self._fault(expected)
        self._next += 1
        return _OPERATORS[token.text]

    def _constant(self, expected: str) -> Constant:
        token = self._peek()
        self._next += 1
        if token.kind == "text":
            return token.text[1:-1].replace("''", "'")
        if token.kind == "number":
            return int(token.text) if token.text.lstrip("+-").isdecimal() else float(token.text)
        if token.kind == "keyword" and token.text in ("true", "false"):
            return token.text == "true"
        self._next -= 1
        raise self._fault(expected)

    def _peek(self) -> _Token:
        return self._tokens[self._next]

    def _take(self, word: str) -> bool:
        token = self._peek()
        is_there = token.kind in ("keyword", "mark") and token.text == word
        self._next += is_there
        return is_there

    def _expect(self, word: str) -> None:
        if not self._take(word):
            raise self._fault(word.upper())

    def _fault(self, expected: str) -> ValueError:
        token = self._peek()
        hints = {"null": "Write IS NULL or IS NOT NULL.", "quoted": "Texts stand in single quotes."}
        advice = hints.get(token.text, hints.get(token.kind, _EXAMPLE))
        raise ValueError(
            f"--where: character {token.place} of {self._text!r} should be {expected} (found {token.text}). {advice}"
        )
