"""How near the students of a run of train_opdlm.py are to their teacher, on held-out prompts.

    python experiments/opdlm/compare.py ckpts_opdlm --data test.pt --output compare

The base decoded block by block (step 0), and every checkpoint that the run has saved
(--SAVE_EVERY), answer the prompts of --data, a file of pt.py:

    kl                  KL(teacher || student) in nats per masked token, the loss of training, on
                        the student's own sampled answers
    agreement           of greedy decoding: the share of its tokens, the end included, that are the
                        teacher's most probable given the tokens before
    tokens_per_forward  of greedy decoding, by the run's THRESHOLD
    ended               share of the greedy answers with an end

Writes a CSV with a line per student, and a text file with greedy answers side by side: the base's
as a student, the last student's, and the teacher's own. The noise depends on --seed alone.
Guide: experiments/docs/opdlm.md
"""

import argparse
import json
import re
import sys
from glob import glob
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # experiments/

import decode
import evaluate
import held_out
import suite
import torch
import train_opdlm
from decoding.block_causal import of_unfinished, roll_out, sample_causally
from suite import write_text
from tqdm import tqdm
from transformers.utils.logging import set_verbosity_error

import pt

COLUMNS = ("step", "model", "kl", "agreement", "tokens_per_forward", "ended", "prompts")


# ------- one student
@torch.no_grad()
def measure(run, student, teacher):
    """The figures of a student, {column: value}, and its greedy answers, tensors of ids."""
    args = run.args
    total = dict.fromkeys(("kl", "agree", "tokens", "forwards", "ended"), 0)
    texts = []
    for numbers in tqdm(run.batches, unit=" batches", desc="compare", leave=False):
        draws = {"id": numbers, "sample": numbers}
        prompts = train_opdlm.prompts_of(run.examples, draws)
        token_noise, block_noise = train_opdlm.draw_noise(args, draws, run.length)
        token_noise = token_noise.to(student.device)

        ids, steps = roll_out(args, student, prompts, token_noise, run.end_ids)
        rows = zip(numbers, ids, steps, block_noise, strict=True)
        answers = {number: train_opdlm.cut(args, *row, run.end_ids) for number, *row in rows}
        of_student = SimpleNamespace(engine=student, examples=run.examples)
        loss = train_opdlm.micro_batch_loss(args, of_student, teacher, answers, draws)
        total["kl"] += loss.item() * len(numbers)

        def count_forwards(rows, _):
            total["forwards"] += len(rows)

        greedy = SimpleNamespace(**vars(args) | {"TEMPERATURE": 0})
        count = of_unfinished(count_forwards, args.MASK_ID)
        ids, _ = roll_out(greedy, student, prompts, token_noise, run.end_ids, count)
        decoded = with_end(ids, run.end_ids)  # (B, N)
        logits = train_opdlm.teacher_logits(student, teacher, prompts, ids, decoded)  # (M, V)
        total["agree"] += int((logits.argmax(-1).cpu() == ids[decoded]).sum())
        total["tokens"] += int(decoded.sum())
        total["ended"] += int(torch.isin(ids, torch.tensor(run.end_ids)).any(1).sum())
        texts += [row[chosen] for row, chosen in zip(ids, decoded, strict=True)]
    count = len(texts)
    figures = {
        "kl": round(total["kl"] / count, 4),
        "agreement": round(total["agree"] / total["tokens"], 4),
        "tokens_per_forward": round(total["tokens"] / total["forwards"], 3),
        "ended": round(total["ended"] / count, 3),
        "prompts": count,
    }
    return figures, texts


def with_end(ids, end_ids):
    """Where ids (B, N) are an answer, up to its first end token, which is part of it."""
    ends = torch.isin(ids, torch.tensor(end_ids)).long()
    return ends.cumsum(1) - ends == 0


def teacher_answers(run, teacher):
    """The teacher's greedy answers to the prompts of the first batch, which are shown."""
    draws = {"id": run.batches[0], "sample": run.batches[0]}
    prompts = train_opdlm.prompts_of(run.examples, draws)
    noise, _ = train_opdlm.draw_noise(run.args, draws, run.length)
    greedy = SimpleNamespace(**vars(run.args) | {"TEMPERATURE": 0})
    ids = sample_causally(greedy, teacher, prompts, noise.to(teacher.device), run.end_ids)
    return [row[chosen] for row, chosen in zip(ids, with_end(ids, run.end_ids), strict=True)]


# ------- main
def main(args):
    decode.set_device(args)
    set_verbosity_error()
    run = read_run(args)
    how = run.args.MODEL_REVISION, args.device, getattr(torch, args.dtype)
    teacher = decode.load_model(run.args.MODEL_NAME, *how)
    lines = []
    answers = {}  # of the first and the last student
    try:
        for step, name in run.students.items():
            student = teacher if step == 0 else decode.load_model(name, "main", *how[1:])
            figures, answers[min(step, 1)] = measure(run, student, teacher)
            lines.append({"step": step, "model": name, **figures})
            print(", ".join(f"{key} {value}" for key, value in lines[-1].items()), flush=True)
            suite.write_csv(f"{args.output}.csv", COLUMNS, lines)
        answers["teacher"] = teacher_answers(run, teacher)
    except torch.OutOfMemoryError:
        sys.exit(f"--batch_size {args.batch_size}: out of memory; give a lower one")
    except KeyboardInterrupt:
        sys.exit("interrupted")
    write_text(f"{args.output}.txt", side_by_side(run, answers))
    print(f"wrote {args.output}.csv and {args.output}.txt")


def read_run(args):
    """The run of train_opdlm.py: its constants, its students, and the held-out prompts.

    Raises:
        SystemExit: if there is no such run, or the data are not its model's.
    """
    path = Path(f"{args.run}_logs") / "run_config.json"
    try:
        constants = json.loads(path.read_text())
        constants = {name: constants[name] for name in train_opdlm.CONSTANTS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(
            f"RUN {args.run}: {path} is not that of train_opdlm.py ({error}); give its CKPT_DIR"
        )
    constants = argparse.Namespace(**constants | {"SEED": args.seed, "LOSS": "kl"})
    students = {0: constants.MODEL_NAME}
    for folder in glob(f"{args.run}_step*"):
        step = re.fullmatch(r".*_step(\d+)", folder)
        if step:
            students[int(step[1])] = folder
    if len(students) == 1:
        sys.exit(f"RUN {args.run}: it has no checkpoint {args.run}_step*; let it train to one")
    of_run = {"data": args.data, "limit": args.limit, "max_len": constants.MAX_LEN}
    examples = held_out.load_rows(argparse.Namespace(**of_run))
    base = constants.MODEL_NAME, constants.MODEL_REVISION
    _, vocabulary = evaluate.load_config(*base)
    held_out.check_ids(examples, args.data, constants.MODEL_NAME, vocabulary)
    tokenizer = pt.load_tokenizer(*base)
    numbers = list(range(len(examples)))
    return SimpleNamespace(
        args=constants,
        students=dict(sorted(students.items())),
        examples=examples,
        batches=[numbers[i : i + args.batch_size] for i in range(0, len(numbers), args.batch_size)],
        length=constants.BLOCK_SIZE * -(-args.gen_length // constants.BLOCK_SIZE),
        tokenizer=tokenizer,
        end_ids=decode.end_ids(tokenizer),
    )


def side_by_side(run, answers):
    """The first batch's prompts, and its greedy answers by the students and the teacher."""
    last = max(run.students)
    titles = {0: "before, as a student", 1: f"student after {last} steps", "teacher": "teacher"}
    parts = []
    for number in run.batches[0]:
        prompt_len, ids = run.examples[number]
        parts.append(f"=== prompt {number}\n{run.tokenizer.decode(ids[:prompt_len])}")
        for key, title in titles.items():
            if key in answers:
                parts.append(f"--- {title}\n{run.tokenizer.decode(answers[key][number])}")
    return "\n".join(parts) + "\n"


# ------- flags
def parse_args(argv=None):
    """The flags; ends with one message and status 2 if one is wrong."""
    parser = suite.make_parser(__doc__)
    add = parser.add_argument
    add("run", metavar="RUN", help="CKPT_DIR of a run of train_opdlm.py")
    add("--data", required=True, metavar="FILE.pt", help="held-out prompts, written by pt.py")
    add("--output", default="compare", help="beginning of the two files' names (%(default)s)")
    add("--limit", type=int, default=64, help="use only the first rows (%(default)s)")
    add("--gen_length", type=int, default=64, help="tokens per answer (%(default)s)")
    add("--batch_size", type=int, default=16, help="prompts at a time (%(default)s)")
    add("--seed", type=int, default=0, help="of the noise (%(default)s)")
    decode.add_device_flags(parser)
    args = parser.parse_args(argv)
    suite.check_lowest(parser, args, limit=1, gen_length=1, batch_size=1, seed=0)
    suite.check_new(parser, args.output, "csv", "txt")
    return args


if __name__ == "__main__":
    main(parse_args())
