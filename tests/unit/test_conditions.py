import pytest

from matryoshka import conditions
from matryoshka.conditions import Absence, Comparison, Condition, Junction, Likeness, Membership, Negation

SAME = {
    "year >= 2020": Comparison("year", ">=", 2020),
    "2020 <= year": Comparison("year", ">=", 2020),
    "year!=-2.5e1": Comparison("year", "<>", -25.0),
    "name = 'it''s'": Comparison("name", "=", "it's"),
    '"a ""b"" and" = TRUE': Comparison('a "b" and', "=", True),
    "name IN ('a', 'b')": Membership("name", ("a", "b")),
    "name not like '%x_'": Negation(Likeness("name", "%x_")),
    "name IS not Null": Negation(Absence("name")),
    "a BETWEEN 1 AND 2 AND b = 3": Junction(
        "and", (Junction("and", (Comparison("a", ">=", 1), Comparison("a", "<=", 2))), Comparison("b", "=", 3))
    ),
    "a = 1 OR b = 2 AND NOT c = 3": Junction(
        "or", (Comparison("a", "=", 1), Junction("and", (Comparison("b", "=", 2), Negation(Comparison("c", "=", 3)))))
    ),
    "NOT NOT ((a = 1))": Comparison("a", "=", 1),
}


@pytest.mark.parametrize("text", SAME)
def test_a_condition_says_what_sql_says(text: str):
    assert conditions.parse(text) == Condition(text, SAME[text])
    assert conditions.parse(text).term == SAME[text]


BAD = {
    "": r"character 1 of '' should be a column \(found the end\)\. Write for example",
    "year": r"character 5 of 'year' should be =, <>, .* or IS \(found the end\)",
    "year == 2020": r"character 7 .* should be a constant \(found =\)",
    "year = null": r"character 8 .* \(found null\)\. Write IS NULL or IS NOT NULL",
    'name = "a"': r"character 8 .* \(found \"a\"\)\. Texts stand in single quotes",
    "name = other": r"character 8 .* should be a constant \(found other\)",
    "name NOT = 'a'": r"character 10 .* should be IN, BETWEEN or LIKE",
    "name IN ()": r"character 10 .* should be a constant \(found \)\)",
    "name LIKE 3": r"character 11 .* should be a pattern in single quotes",
    "(a = 1": r"character 7 .* should be \) \(found the end\)",
    "a = 1 b = 2": r"character 7 .* should be AND, OR or the end \(found b\)",
    "a = 1; DROP": r"character 6 .* begins nothing that is known here",
    "a = 'x": r"character 5 .* begins nothing that is known here",
    "1 = 2": r"character 5 .* should be a column",
    "(" * 60 + "a = 1": r"more than 50 levels of parentheses\. Write it simpler",
}


@pytest.mark.parametrize("text", BAD)
def test_what_is_not_a_condition_is_refused_with_its_place(text: str):
    with pytest.raises(ValueError, match=f"^--where: {BAD[text]}"):
        conditions.parse(text)
