"""Compare a model's answer with the right one: exact match, and math-verify in its own process.

    echo '["The answer is: 1/2", "0.5"]' | python experiments/tasks/grade.py      # prints [true]

Reads lines of JSON `[text, gold]` and prints `[verdict]` for each. A symbolic comparison can take
forever, or all memory, and cannot be interrupted in the middle of a computation in C. So the system
ends the process after SECONDS on one line, and limits its memory to GIGABYTES. `equal_in_time`
starts such a process, and another one after a line that ended it.
Guide: experiments/docs/evaluation.md
"""

import argparse
import json
import os
import re
import resource
import signal
import subprocess
import sys
from functools import cache

SECONDS = 30
GIGABYTES = 4

# ------- where an answer is stated, and where it ends
BOX = r"\\(?:boxed|fbox)\s*\{"
SAID = r"the (?:final |correct )?answer is(?:\**:\s*|\s+)(?=[^\s.]|\.\S)"
MARKS = re.compile(rf"{SAID}|####(?!#)\s*(?=\S)|{BOX}", re.I)
END = re.compile(r"\.?(?:\n|$)|\.\s")  # the line's end or a full stop
DISPLAY = re.compile(r"(?:\\\[|\$\$)(.*?)(?:\\\]|\$\$|$)", re.S)  # a formula, on lines of its own
SENTENCE_END = re.compile(r"[.!?]\s|\n\s*\n")

# ------- other ways to write the same formula, one after another
SIGNS = {"\N{MINUS SIGN}": "-", "\N{EN DASH}": "-", "\N{MULTIPLICATION SIGN}": r"\times "}
SIGNS |= {"\N{RIGHT SINGLE QUOTATION MARK}": "'", "·": r"\cdot ", "÷": "/", "√": r"\sqrt "}
SIGNS |= {"π": r"\pi ", "∞": r"\infty ", "²": "^2", "³": "^3", "≤": r"\le ", "≥": r"\ge "}
DEGREE = r"\s*\^\s*(?:\\circ\b|\{\s*\\circ\s*\})|°|\\degree\b"
SPELLINGS = [
    (r"\\!|(?<!\\)\\[()\[\]]|(?:\bUS)?\\?[$€£¥]", ""),  # delimiters, currencies
    (r"\{,\}", ","),
    (r"(?<!\\)\\[,;: ]|~|\\q?quad\b|\s+", " "),
    (r"(?<![\w)}])(\*\*|__|\*|_|`+)(?=\S)(.+?)(?<=\S)\1(?![\w({])", r"\2"),  # emphasis
    (r"^[\s*_`:]+|[\s*_`]+$", ""),  # half of an emphasis that "The answer is" is a part of
    (r"^(?:≈|\\approx\b)\s*", ""),
    (
        r"\\(?:(?:math|text)(?:bf|it|tt|sf)|boldsymbol|bm|emph|underline|boxed|fbox)\s*\{([^{}]*)\}",
        r"\1",
    ),
    (r"\\(?:mathrm|operatorname|mbox|hbox|textrm|textnormal)\b", r"\\text"),
    (r"\\text\s*\{\s*([dei]|[-+]?[\d.,/]+)\s*\}", r"\1"),  # constants
    (
        r"\\frac\s*\{\s*\\text\s*\{([^{}]*)\}\s*\}\s*\{\s*\\text\s*\{([^{}]*)\}\s*\}",
        r"\\text{\1/\2}",
    ),
    (r"\\(?:left|right)(?![a-zA-Z])|\\displaystyle\b", ""),
    (r"\\[dtc]frac", r"\\frac"),
    (
        rf"(?:{DEGREE})(?:\s*(?:[CF]\b|\\text\s*\{{\s*[CF]\s*\}}))?|\\text\s*\{{\s*degrees?\s*\}}",
        "",
    ),
    (r"\\text\s*\{\s*per\s?cent\s*\}|\bper\s?cent\b|\s*\\?%", r"\\%"),
    (r"\\?\bsqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"(?<!\w)(\d+(?:\.\d+)?)[eE]\+?(-?\d+)(?!\w)", r"\1\\cdot 10^{\2}"),
    (r"(?<![\w.,/^}])(\d+) +(\d+)/(\d+)(?![\d/])", r"\1\\frac{\2}{\3}"),  # 2 1/2
    (r"^[a-zA-Z]\s*\\in\b\s*", ""),
    (r"(?<!\.)\.$", ""),
]
SPELLINGS = [(re.compile(pattern), put) for pattern, put in SPELLINGS]
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:[, ]\d{3})+(?!\d|,\d)")
ELLIPSIS = re.compile(r"\\[lcd]?dots|\.\.\.|…")
BASE = re.compile(r"\d_\{?(?:\d|\\text)")  # a number whose base is given

# ------- words beside a number
UNITS = set(
    "mm cm dm km in ft yd mi mg kg lb lbs oz ml sq cu ms sec min hr hrs mph kph am pm rs".split()
)
LETTERS = set("mgslLhVWJNCFK")  # units too, where the right answer has no variables
SMALL_WORDS = set("a an as at by i in is my of on so to us".split())
SUBJECTS = set("he it so we".split())  # with which a sentence can begin
NO_UNITS = """
    minus plus negative not or nor over under above below least most between except
    without excluding half halves thirds fourths fifths sixths eighths tenths hundredths thousandths
    hundred thousand million billion trillion hundreds thousands millions billions dozen dozens
    twice double triple root squared cubed factorial divided multiplied power mod pmod
    multiple multiples factor factors reciprocal inverse opposite sin cos tan cot csc log exp
    max gcd lcm arcsin arccos arctan sinh cosh tanh lim det infinity undefined unknown answer
"""
NO_UNITS = set(NO_UNITS.split())  # with one of them, the number beside it is not the answer
TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
LAST_TEXT = re.compile(r"[\s/]*\\text\s*\{([^{}]*)\}\s*(?:\^\s*\{?\d\}?)?\s*$")
REMARK = re.compile(r"\s+\(([^()\d]*)\)$")
REASON = re.compile(r"[,;]?\s+(?:because|since|which)\b.*")
VERB = re.compile(r"^(?!\W*\d)\S.*\s(?:is|are|was|were|equals?|makes?)\b:?\s+(?=\S)")
GLUED = re.compile(rf"(?<=[\d}}])(?:{'|'.join(sorted(UNITS))})(?:\^\{{?\d\}}?|\d)?$")


def final_answer(text):
    """What follows the last "The answer is" or "####", or is in the last \\boxed{}.

    None if the text states no answer, and "" if the last brace is not closed.
    """
    marks = list(MARKS.finditer(text))
    if not marks:
        return None
    rest = text[marks[-1].end() :]
    if is_box(marks[-1]):
        return (up_to_brace(rest) or "").strip()
    display = DISPLAY.match(rest)
    return (display[1] if display else END.split(rest)[0]).strip()


def is_box(mark):
    return mark[0].endswith("{")


def up_to_brace(text):
    """`text` up to the brace that closes one opened before it; None if there is none."""
    depth = 1
    for end, character in enumerate(text):
        if character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
        if depth == 0:
            return text[:end]
    return None


def last_boxes(text):
    """The contents of all \\boxed{} in the sentence of the last one, whose brace is closed."""
    boxes = [mark for mark in MARKS.finditer(text) if is_box(mark)]
    ends = [end.end() for end in SENTENCE_END.finditer(text, 0, boxes[-1].start())]
    start = max(ends, default=0)
    return [up_to_brace(text[box.end() :]) or "" for box in boxes if box.start() >= start]


def exact_match(text, gold):
    """Whether the final answer of `text` is `gold`, apart from blanks, commas and dollar signs."""
    answer = final_answer(text)
    return bool(answer) and normalize(answer) == normalize(gold)


def normalize(answer):
    return re.sub(r"\\?[\s,$]|\\!", "", answer)


def equal(text, gold):
    """Whether math-verify finds the final answer of `text` equal to `gold`.

    A text without a final answer is compared by its last mathematical expression.
    """
    from math_verify import parse  # here: only the process that compares needs it

    answer = final_answer(text)
    if answer is None:
        found = parse(text.replace(r"\$", "$"), parsing_timeout=None)
        return any(same_value(read(reading), found) for reading in readings(gold))
    if same_answer(answer, gold):
        return True
    if not is_box(list(MARKS.finditer(text))[-1]):
        return False
    boxes = last_boxes(text)
    return len(boxes) == len(parts(gold)) > 1 and same_answer(", ".join(boxes), gold)


def same_answer(answer, gold):
    """Whether two answers are the same text, the same words, or formulas of the same value."""
    answer_text, gold_text = spell(answer), spell(gold)
    if compact(answer_text) == compact(gold_text):
        return True
    if words(gold_text):
        return letters(answer_text) == letters(gold_text)
    if ELLIPSIS.search(answer_text + gold_text):
        return False  # math-verify reads over it
    if BASE.search(answer_text) and BASE.search(gold_text):
        return False  # math-verify does not read it
    variables = has_variables(readings(gold)[-1])
    pairs = [(a, g) for a in readings(answer, variables) for g in readings(gold)]
    pairs = [(percent_free(a), percent_free(g)) for a, g in pairs] + pairs
    return any(same_formula(a, g) for a, g in dict.fromkeys(pairs))


def spell(answer):
    """`answer` in one of the many ways in which it can be written."""
    for sign, put in SIGNS.items():
        answer = answer.replace(sign, put)
    for pattern, put in SPELLINGS:
        answer = pattern.sub(put, answer)
    if not re.search(r"[(\[]|\\\{", answer):  # in brackets, commas are those of a tuple
        answer = THOUSANDS.sub(lambda number: re.sub("[, ]", "", number[0]), answer)
    return answer.strip()


def compact(formula):
    """`formula` without what does not change it: some blanks, and braces around one character."""
    formula = re.sub(r"([_^])\{(\w)\}", r"\1\2", formula)
    return re.sub(r"(?<!\w)\s+|\s+(?!\w)", "", formula)


def words(formula):
    """Whether it is no formula, but words or the letter of a choice: \\text{Evelyn}, (C)."""
    return re.fullmatch(r"\\text\s*\{[^{}\d]*\}|\([A-Z]\)", formula)


def letters(formula):
    return re.sub(r"[\W_]", "", TEXT.sub(r"\1", formula)).lower()


def has_variables(formula):
    return bool(re.search(r"[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", "", formula)))


def percent_free(formula):
    return formula.replace(r"\%", "")


def parts(gold):
    """The parts of a list, which are separated by commas outside brackets."""
    found, depth = [""], 0
    for character in re.sub(r"\\text\s*\{\s*(and|or)\s*\}|\b(and|or)\b", ",", spell(gold)):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            found.append("")
        else:
            found[-1] += character
    return [part for part in found if part.strip()]


def readings(answer, variables=True):
    """The formulas that `answer` can be: all of it, and without the words and units beside it."""
    formula = spell(answer)
    return list(dict.fromkeys([formula, without_words(formula, variables)]))


def without_words(formula, variables):
    """`formula` without the sentence and the units around it; as it is if they change its value."""
    rest = REASON.sub("", formula)
    unit = LAST_TEXT.search(rest)
    while unit and unit.start() and all(is_word(word) for word in unit[1].split()):
        rest = rest[: unit.start()]
        unit = LAST_TEXT.search(rest)
    if re.search(r"\bthan [\d\\]", rest):
        return formula
    rest = VERB.sub("", TEXT.sub(r" \1 ", rest))
    remark = REMARK.search(rest)
    if remark and all(is_word(word) for word in remark[1].split()):
        rest = rest[: remark.start()]
    tokens = rest.split()
    units = UNITS if variables else UNITS | LETTERS
    after = 0
    while len(tokens) > 1 and is_unit(tokens[-1], units | (SMALL_WORDS if after else set())):
        after += len(bare(tokens.pop())) > 2
    before = next((n for n, token in enumerate(tokens) if re.search(r"[\d\\]", token)), 0)
    if all(is_word(token) for token in tokens[:before]) and any(
        is_unit(token, SUBJECTS) for token in tokens[:before]
    ):
        tokens = tokens[before:]
    rest = GLUED.sub("", " ".join(tokens).rstrip(" ,;:"))
    if not variables:
        rest = re.sub(rf"(?<=\d)[{''.join(LETTERS)}](?:\^\{{?\d\}}?)?$", "", rest)
    return spell(rest) if rest else formula


def bare(token):
    """A word without punctuation and exponent."""
    return re.sub(r"\^?\{?[23]\}?$", "", token.strip(".,;:!?'\"()")) or token


def is_word(token):
    """Whether it consists of letters, and does not change the value of a number beside it."""
    names = re.split(r"[-/'.]", bare(token))
    return all(name.isalpha() or not name for name in names) and not NO_UNITS & {
        name.lower() for name in names
    }


def is_unit(token, short):
    """Whether it is a word of three letters, or one of those in `short`; or several, as in m/s."""
    names = [name for name in re.split(r"[-/'.]", bare(token)) if name]
    return is_word(token) and all(
        len(name) > 2 or name in short or name.lower() in short - LETTERS for name in names
    )


def same_formula(answer, gold):
    return compact(answer) == compact(gold) or same_value(read(gold), read(answer))


def read(formula):
    """What math-verify reads, of a whole formula."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    # its own rules for units damage formulas: x + h becomes x +
    rules = NormalizationConfig(malformed_operators=True, nits=True, boxed="none")
    percent = r"\%" if formula.endswith(r"\%") else ""
    formula = f"${formula.removesuffix(percent)}${percent}"
    config = [LatexExtractionConfig(normalization_config=rules)]
    return parse(formula, config, parsing_timeout=None)


def same_value(gold, found):
    from math_verify import verify

    return verify(gold, found, timeout_seconds=None)


def equal_in_time(text, gold):
    """The verdict of `equal`, from the other process: True, False, or None.

    None is for a comparison that ended the process, by taking too long. One that runs out of memory
    is False, and so is one that math-verify cannot read.
    """
    process = start_process(os.getpid())
    try:
        process.stdin.write(json.dumps([text, gold]).encode() + b"\n")
        return json.loads(process.stdout.readline())[0]
    except (BrokenPipeError, json.JSONDecodeError):
        process.kill()
        process.wait()
        start_process.cache_clear()
        return None


@cache
def start_process(_):
    """The process that compares for this one, and ends with it, as its input ends."""
    pipe = subprocess.PIPE
    command = [sys.executable, __file__]
    null = subprocess.DEVNULL
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=null, bufsize=0)


def check():
    """Check that math-verify works.

    Raises:
        SystemExit: if it does not.
    """
    if not equal_in_time("1", "1") or equal_in_time("1", "2") is not False:
        command = f'echo \'["1", "1"]\' | {sys.executable} {__file__}'
        sys.exit(f"math-verify does not work here; to see why: {command}")


def main(_):
    """Answer lines until the input ends; there are no flags but --help."""
    import math_verify  # noqa: F401 (slow, and may fail: before the first line's time is counted)

    limit = GIGABYTES << 30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for line in sys.stdin:
        signal.alarm(SECONDS)  # nothing handles this signal: it ends the process
        try:
            verdict = equal(*json.loads(line))
        except Exception:  # math-verify and sympy fail in many ways on what is not mathematics
            verdict = False
        signal.alarm(0)
        print(json.dumps([verdict]), flush=True)


def parse_args(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
