"""A final answer is found, and compared as a person would; a problem has a right answer."""

import json
from pathlib import Path

import pytest
import suite
from tasks import grade, metamath

# ------------------------------------------------------------------------------- the final answer


@pytest.mark.parametrize(
    "text, answer",
    [
        ("2 + 3 = 5\n#### 5\nThe answer is: 5", "5"),
        ("The answer is 1. No: the answer is: \\frac{1}{2}.", "\\frac{1}{2}"),
        ("so\n#### 1,234", "1,234"),
        ("thus \\boxed{x^{2}+\\frac{1}{2}} and done", "x^{2}+\\frac{1}{2}"),
        ("The answer is:\n7", "7"),
        ("The final answer is 7.", "7"),
        ("The answer is:\n\\[\n7\n\\]\nas said", "7"),
        ("\\boxed{1", ""),
        ("\\boxed{5}. No: \\boxed{1", ""),
        ("it is 5", None),
        ("it is 5. The answer is:", None),
        ("We want to know what the answer is.\nIt is 7", None),
        ("The answer is: $\\boxed{5}$.", "5"),
        ("We look for what the answer is in units of x.\n\\boxed{3}", "3"),
        ("The answer is: 5. So 7 are left", "5"),
        ("The answer is: 2.50", "2.50"),
        ("The answer is: .5", ".5"),
        ("", None),
    ],
)
def test_final_answer(text, answer):
    assert grade.final_answer(text) == answer


# --------------------------------------------------------------------------------------- verdicts

VERDICTS = [  # text, gold, equal, exact match
    ("The answer is: 18.", "18", True, True),
    ("The answer is: $18", "18", True, True),
    ("The answer is: 1,800", "1800", True, True),
    ("The answer is: 0.5", "\\frac{1}{2}", True, False),
    ("The answer is: x + 1", "1+x", True, False),
    ("so \\boxed{\\frac{4}{8}}", "1/2", True, False),
    ("It is 7", "7", True, False),
    ("The answer is: 17", "18", False, False),
    ("The answer is: -18", "18", False, False),
    ("", "18", False, False),
    ("The answer is: }{", "18", False, False),
    ("The answer is: 36", "\\$36", True, True),
    ("The answer is: 32348", "\\$32,\\!348", True, True),
    ("The answer is: 18 eggs", "18", True, False),
]


@pytest.mark.slow
def test_verdicts_of_the_other_process():
    pairs = [(text, gold) for text, gold, _, _ in VERDICTS]
    assert [grade.equal_in_time(*pair) for pair in pairs] == [equal for *_, equal, _ in VERDICTS]


@pytest.mark.parametrize("text, gold, equal, exact", VERDICTS)
def test_verdicts(text, gold, equal, exact):
    assert grade.equal(text, gold) is equal
    assert grade.exact_match(text, gold) is exact


GOLDS = r"""
\frac{3}{4}
\dfrac{14}{3}
\frac43
\frac{\sqrt{3}}{3}
-\frac{1}{2}
2\frac12
42\frac{1}{2}
3\sqrt{13}
\sqrt{51}
6 - 5i
-2 + 7i
1 \pm \sqrt{19}
\pi
\frac{9\pi}{4}
12\pi
\left( 3, \frac{\pi}{2} \right)
(5,100)
(6,31,-1)
\left(\frac{3}{5},\frac{8}{3}\right]
[-2,7]
x \in [-2,7]
(-\infty, 2) \cup (3, \infty)
(2,12) \cup (12,102)
\left[0,\infty\right)
\left( -\infty, \frac{1}{2} \right]
\{1,2,3\}
\emptyset
1,-2
3, 5, 7
1,2,3,4,6,12
-1,\frac{1}{2}
1+\sqrt{2},1-\sqrt{2}
\begin{pmatrix} -1/3 \\ 2/3 \\ 5/3 \end{pmatrix}
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}
\begin{pmatrix}16/49 \\ 48/49 \\ 24/49\end{pmatrix}
\text{Evelyn}
\text{(C)}
\text{east}
\text{odd}
\text{Navin}
\text{ellipse}
\text{6:30 p.m.}
p - q
11\sqrt2
x^3 + 3x - 6
6r^2-4r-24
(3a + b)(3a - b)
(x+1)(x-1)
2k+2
x = 5
y = 2x + 3
y=-2x
5x - 7y + 11z + 4 = 0
x^2+y^2=1
2 < x < 3
x > 2
90^\circ
28^\circ
58^{\circ}
10\%
12.5\%
100\text{ cm}^2
36 \text{ m}
15\mbox{ inches}
18 \text{ square units}
5 \text{ cm}
4_5
204_5
1011_2
4210_{5}
\$36
\$18.90
\$32,\!348
11,111,111,100
1,\!000,\!000
10,080
-9
0
.35
0.\overline{3}
2.5 \times 10^{-3}
\frac{3}{16}t
3h
x + h
2^{10}
7!
\binom{5}{2}
\log_2 5
e^{2}
1 + e
\sin x
-\sin x
\frac{2}{e}
\sqrt[3]{4}
\frac{x+2}{7}
4:5
\cot x
\infty
\text{neither}
\angle A
\overline{AB}
f(x) = x + 1
5 \pmod{7}
120^\circ, 60^\circ
70 \sqrt{2}
\lfloor x \rfloor
AB
A
E
n
1, 2, \ldots, n
\left\{ 1, 2 \right\}
2 \text{ and } 3
x=1 \text{ or } x=2
"""  # in the styles of MATH-500's and GSM8K's


@pytest.mark.parametrize("gold", GOLDS.strip().splitlines())
def test_a_right_answer_is_equal_to_itself(gold):
    for form in ("so $\\boxed{%s}$.", "The answer is: %s", "The answer is: %s. So", "#### %s"):
        assert grade.equal(form % gold, gold)
        assert grade.exact_match(form % gold, gold)
    assert grade.equal(f"**The answer is: ${gold}$.**", gold)


UNITS = """
apples
books
boxes
cents
children
clips
cm
cookies
cubic feet
cups
days
degrees
dollars
dollars per day
eggs
feet
g
gallons
games
grams
hours
hr
inches
kg
kilometers
km
km/h
lbs
liters
m
m/s
meters
miles
miles per hour
min
minutes
ml
mm
months
mph
ounces
oz
pages
people
percent
pieces
points
pounds
sec
seconds
slices
sq ft
square-feet
stickers
students
tickets
times
tons
units
weeks
yards
years
"""


@pytest.mark.parametrize("unit", UNITS.strip().splitlines())
def test_a_unit_does_not_matter(unit):
    for form in (
        "The answer is: 18 %s.",
        "#### 18 %s",
        "\\boxed{18\\text{ %s}}",
        "\\boxed{18}\\ %s",
    ):
        assert grade.equal(form % unit, "18")
        assert not grade.equal(form % unit, "17")


EQUAL = [
    ("The answer is: Tom has 10 more marbles than Ann.", "10"),
    ("The answer is: 10, so Tom wins", "10"),
    ("The answer is: \\underline{10}", "10"),
    ("The answer is: ≈ 10", "10"),
    ("The answer is: US$10", "10"),
    ("The answer is: *72*", "72"),
    ("The answer is: __72__", "72"),
    ("**The answer is: 72**", "72"),
    ("**The answer is:** 72", "72"),
    ("**The answer is**: 72", "72"),
    ("The answer is: $72$ clips", "72"),
    (r"The answer is: \(72\) clips.", "72"),
    (r"The answer is: \[72\]", "72"),
    ("The answer is:\n\\[\n\\frac{1}{2}\n\\]\nok", r"\frac{1}{2}"),
    ("The answer is:\n7", "7"),
    ("The answer is:\n$$7$$", "7"),
    ("The answer is: **72 clips**", "72"),
    ("The answer is: **$18**", "18"),
    ("The answer is: **$18.**", "18"),
    ("The answer is: Natalia sold 72 clips altogether in April and May.", "72"),
    ("The answer is: there are 72 clips in total", "72"),
    ("The answer is: Janet makes $18 every day at the farmers' market.", "18"),
    ("The answer is: $18 per day", "18"),
    ("The answer is: a total of 72 clips", "72"),
    (r"The answer is: \mathbf{72}", "72"),
    (r"The answer is: \textbf{72}", "72"),
    (r"The answer is: \text{72}", "72"),
    (r"so \boxed{\text{72 clips}}", "72"),
    ("The answer is: 5cm", "5"),
    ("The answer is: 100m", "100"),
    ("The answer is: 60mph", "60"),
    ("The answer is: 3 sq. ft", "3"),
    ("The answer is: 2 1/2 cups", "2.5"),
    ("The answer is: 2 1/2", r"\frac{5}{2}"),
    ("The answer is: 1/2 cup", r"\frac12"),
    (r"The answer is: \frac{1}{2} of the cake", "1/2"),
    ("The answer is: 3 * 24 = 72 clips", "72"),
    ("The answer is: x = 5", "5"),
    ("The answer is: x = 5 cm", "5"),
    ("The answer is: \N{MINUS SIGN}5", "-5"),
    ("The answer is: -5 degrees", "-5"),
    ("The answer is: 18 USD", "18"),
    ("The answer is: USD 18", "18"),
    ("The answer is: €18", "18"),
    ("The answer is: 18€", "18"),
    ("The answer is: £1,800.50", "1800.5"),
    ("The answer is: 36 cm^2", r"36\text{ cm}^2"),
    ("The answer is: 36", r"36\text{ cm}^2"),
    ("The answer is: 36 square centimeters", r"36\text{ cm}^2"),
    (r"\boxed{36 \text{ cm}^2}", "36"),
    (r"\boxed{36\,\text{cm}^2}", "36"),
    (r"\boxed{36~\mathrm{cm^2}}", "36"),
    (r"\boxed{5\ \mathrm{m/s}}", "5"),
    (r"\boxed{5\,\frac{\text{m}}{\text{s}}}", "5"),
    ("The answer is: 50%", "50"),
    ("The answer is: 50", r"50\%"),
    ("The answer is: 50 percent", r"50\%"),
    ("The answer is: 12.5%", "12.5"),
    ("The answer is: 0.5", r"50\%"),
    ("The answer is: 12.5 percent of them", "12.5"),
    ("The answer is: 90 degrees", r"90^\circ"),
    ("The answer is: 90", r"90^\circ"),
    ("The answer is: 90°", "90"),
    ("The answer is: 1 and -2", "1,-2"),
    ("The answer is: -2, 1", "1,-2"),
    (r"$x=\boxed{1}$ or $x=\boxed{-2}$.", "1,-2"),
    (r"We get \boxed{1}, \boxed{2} and \boxed{3}.", "1,2,3"),
    ("\\boxed{3}\n\\boxed{5}", "3,5"),
    (r"so $\boxed{3}$ and $\boxed{5}$", "5,3"),
    (r"$\boxed{2}$ and $\boxed{3}$", r"2 \text{ and } 3"),
    ("The answer is: x=3 and x=5", "3,5"),
    ("The answer is: $3$ and $5$", "3,5"),
    ("The answer is: 10000000000000000000000", "10000000000000000000000"),
    ("The answer is: 10^{22}", "10000000000000000000000"),
    ("The answer is: 1e22", "10000000000000000000000"),
    ("The answer is: 70 000", "70000"),
    (r"The answer is: 70\,000", "70000"),
    ("The answer is: 70{,}000", "70000"),
    (r"The answer is: 70,\!000", "70000"),
    (r"The answer is: \$70,000.00", "70000"),
    ("The answer is: Evelyn", r"\text{Evelyn}"),
    ("The answer is: **Evelyn**.", r"\text{Evelyn}"),
    (r"\boxed{\textbf{(C)}}", r"\text{(C)}"),
    ("The answer is: C", r"\text{(C)}"),
    ("The answer is: (C)", r"\text{(C)}"),
    (r"\boxed{\mathrm{Evelyn}}", r"\text{Evelyn}"),
    ("The answer is: [-2,7]", r"x \in [-2,7]"),
    ("The answer is: (5, 100)", "(5,100)"),
    ("The answer is: 204_{5}", "204_5"),
    (r"The answer is: 2\pi cm", r"2\pi"),
    (r"The answer is: $2\pi$ square units", r"2\pi"),
    ("The answer is: 2π", r"2\pi"),
    ("The answer is: √2", r"\sqrt{2}"),
    (r"The answer is: \sqrt(2)", r"\sqrt{2}"),
    ("The answer is: sqrt(2)", r"\sqrt2"),
    ("The answer is: 72 (clips)", "72"),
    ("The answer is: 72 because 24 * 3 = 72", "72"),
    ("The answer is: 5 more apples", "5"),
    ("It is 72 clips", "72"),
    (r"He makes \$18.", "18"),
    (r"He makes \$18 per day, so it is **\$18**.", "18"),
    ("The answer is: 36", r"36\text{ m}"),
    ("The answer is: 36 m", "36"),
    ("The answer is: 5 m/s^2", "5"),
    (r"\boxed{5\text{ m}/\text{s}^2}", "5"),
    (r"The answer is: \frac{2}{4}", "1/2"),
    ("The answer is: The area of the square is 36 square cm", "36"),
    (r"\boxed 5", "5"),
    ("The answer is: 5x + 3 dollars", "5x+3"),
    (r"The correct answer is \$18", "18"),
    ("The answer is: 16/2 = 8 eggs.", "8"),
    ("The answer is: He has 18.", "18"),
    ("#### $18", "18"),
    ("#### 18 dollars", "18"),
    ("#### **18**", "18"),
    ("The answer is: $1.50", "1.5"),
    (r"The answer is: \$1.50 each", "1.50"),
    ("The answer is: 3:30 pm", "3:30"),
    ("The answer is: 10 inches by the end of the year", "10"),
    (r"The answer is: $\$18$", "18"),
    (r"The answer is: \text{\$}18", "18"),
    (r"The answer is: 18\%", "18"),
]


@pytest.mark.parametrize("text, gold", EQUAL)
def test_answers_in_words_and_other_spellings(text, gold):
    assert grade.equal(text, gold)


UNEQUAL = [
    ("The answer is: x > 7", "7"),
    ("The answer is: at most 7", "7"),
    ("The answer is: 7 to 9", "9"),
    ("The answer is: 7n apples", "7"),
    ("The answer is: 7 of the 18", "18"),
    ("The answer is: 2x", "2"),
    ("The answer is: 2 x", "2"),
    ("The answer is: 2 xy", "2"),
    ("The answer is: 5t", "5"),
    ("The answer is: 5", "5t"),
    ("The answer is: x", "x + h"),
    ("The answer is: x", r"\sin x"),
    ("The answer is: sin x", "x"),
    ("The answer is: 5 million", "5"),
    ("The answer is: 5 dozen", "5"),
    ("The answer is: minus 5", "5"),
    ("The answer is: negative 5", "5"),
    ("The answer is: not 5", "5"),
    ("The answer is: more than 5", "5"),
    ("The answer is: 5 or more", "5"),
    ("The answer is: 12 hours and 30 minutes", "12"),
    ("The answer is: 12 hours and 30 minutes", "30"),
    ("The answer is: 18 dollars and 50 cents", "18"),
    ("The answer is: 18 dollars and 50 cents", "50"),
    ("The answer is: 5 and a half", "5"),
    ("The answer is: 4_6", "4_5"),
    ("The answer is: 2**3", "23"),
    ("The answer is: 2**3 = 8", "23"),
    ("The answer is: (B)", r"\text{(C)}"),
    ("The answer is: silent", r"\text{listen}"),
    ("The answer is: 3", "3,5"),
    (r"so \boxed{3}.  Then \boxed{5}", "3,5"),
    (r"\boxed{3} or \boxed{4}", "3,5"),
    (r"\boxed{5}. Final: \boxed{5", "5"),
    (r"The answer is: 5. No. The answer is: \boxed{", "5"),
    (r"\boxed{5} so The answer is: x", "5"),
    ("2+3=5. The answer is: unknown", "5"),
    ("2+3=5. The answer is: I do not know", "5"),
    ("The answer is: }{ 5", "5"),
    ("The answer is: 0.1%", r"10\%"),
    ("The answer is: 1 2", "12"),
    ("The answer is: 12", "1,2"),
    ("The answer is: (1,2)", "12"),
    ("The answer is: half of 5", "5"),
    ("The answer is: the square root of 36", "36"),
    ("The answer is: 5!", "5"),
    ("The answer is: x^2", "2"),
    ("The answer is: 5 is the smallest of 18", "18"),
    ("The answer is: 5 less than 10", "5"),
    ("The answer is: 5 less than x", "5"),
    ("The answer is: all x except 5", "5"),
    (r"The answer is: \frac{5}{3} x", "5/3"),
    (r"The answer is: 1 - \frac{1}{\text{e}}", r"1 + \frac{1}{\text{e}}"),
    ("The answer is: x + 1", "x"),
    (r"The answer is: 3\sqrt(5)", "3"),
    (r"The answer is: 2, 4, 6, \dots, 2n", r"2, 4, \dots, n"),
    (r"The answer is: 5 \text{ million}", "5"),
    (r"The answer is: 36 \text{ cm}^2", r"35 \text{ cm}^2"),
    ("The answer is: 1 + e", "1 - e"),
    (r"The answer is: 2\frac{1}{2}", "1"),
    ("The answer is: 2 1/2", "1"),
    (r"The answer is: 5 \text{ or } 6", "5"),
    (r"The answer is: -2\frac12", "-1.5"),
    ("The answer is: 18.5", "18"),
    ("The answer is: 1,800", "1.8"),
    ("The answer is: y", "x"),
    ("The answer is: [1,2)", "[1,2]"),
    ("The answer is: (2,1)", "(1,2)"),
    ("The answer is: 17 eggs", "18"),
    ("The answer is: 5 times x", "5"),
    ("The answer is: 3 years and 5 months", "3,5"),
    ("The answer is: 10^{22}", "10000000000000000000001"),
    ("The answer is: 20% of 50", "50"),
    ("The answer is: Since 2+3=5, unknown", "5"),
    (r"\boxed{x} 5", "5"),
]


@pytest.mark.parametrize("text, gold", UNEQUAL)
def test_another_answer_is_wrong(text, gold):
    """Though the right one is a part of it, or stands before it."""
    assert not grade.equal(text, gold)


# ------------------------------------------------------------------------------ the other process

STUBBORN = """
from tasks import grade

def equal(text, gold):
    if text == "hang":
        return bool(10**10**10)
    if text == "memory":
        return bool(bytearray(1 << 36))
    return text == gold

grade.SECONDS = 2
grade.equal = equal
grade.main(None)
"""


@pytest.mark.slow
def test_a_comparison_that_hangs_or_fills_the_memory_is_ended(monkeypatch, tmp_path):
    """From outside, in the middle of a computation in C; the other comparisons are made."""
    script = tmp_path / "stubborn.py"
    script.write_text(STUBBORN)
    monkeypatch.setattr(grade, "__file__", str(script))
    monkeypatch.setenv("PYTHONPATH", str(Path(suite.__file__).parent))
    pairs = [("7", "7"), ("hang", "7"), ("7", "7"), ("memory", "7"), ("8", "7")]
    grade.start_process.cache_clear()
    verdicts = [grade.equal_in_time(*pair) for pair in pairs]
    grade.start_process.cache_clear()
    assert verdicts == [True, None, True, False, False]


# ------------------------------------------------------------------------------------ the problems


@pytest.mark.parametrize(
    "solution, answer",
    [
        (18, "18"),
        (1.5, "1.5"),
        (1e22, "1" + 22 * "0"),
        (10**22, "1" + 22 * "0"),
        (1.5e-05, "0.000015"),
        ("So.\n#### 1,000", "1,000"),
        ("\\boxed{x}", "x"),
        ("7! \\cdot 3", "7! \\cdot 3"),
        ("\\text{6:30 p.m.}", "\\text{6:30 p.m.}"),
    ],
)
def test_the_right_answer_of_a_problem(solution, answer):
    row = json.loads(json.dumps({"query": "a", "response": solution}))
    assert metamath.make_problem(row, "line 1") == {"query": "a", "answer": answer}
    assert grade.equal(f"The answer is: {answer}", answer)


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"query": "a", "answer": NaN}', "line 2 has no final answer: nan"),
        ('{"query": "a", "answer": -Infinity}', "line 2 has no final answer: -inf"),
        ('{"query": "a", "answer": 1e999}', "line 2 has no final answer: inf"),
        ('{"query": "a", "answer": "nan"}', "line 2 has no final answer"),
        ('{"query": "a", "answer": " "}', "line 2 has no final answer"),
        (
            '{"query": "a", "response": "in this case.The answer is: "}',
            "line 2 has no final answer",
        ),
        ('{"query": "a", "response": "The answer is: 1\\nThe answer is:"}', "line 2 has no final"),
        ('{"query": "a", "response": "so\\n#### "}', "line 2 has no final answer"),
        ('{"query": "a", "response": "so \\\\boxed{5"}', "line 2 has no final answer"),
        ('{"query": "a", "response": "so \\\\boxed{}"}', "line 2 has no final answer"),
        ('{"query": "a", "response": "He has 2. So it is 3 then. Done"}', "line 2 has no final"),
        ('[{"query": "a", "answer": "1"}]', "the file must hold one JSON object per line"),
        ('[\n{"query": "a", "answer": "1"}\n]', "the file must hold one JSON object per line"),
        ('{\n"query": "a"\n}', "the file must hold one JSON object per line"),
    ],
)
def test_bad_problems(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"query": "a", "answer": "1"}\n' + line)
    with pytest.raises(ValueError, match="line 2 ") as refused:
        metamath.read_problems(path)
    assert message in str(refused.value)
