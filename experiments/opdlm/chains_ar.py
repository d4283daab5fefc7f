"""An autoregressive base on the toy task, for train_opdlm.py.

    python experiments/opdlm/chains_ar.py --output DIR      # DIR/model and DIR/data, two minutes

The model is a small Qwen3, trained from scratch on chains.py's worked-out answers. The folder is
what chains.py builds, but for the model and its end-of-turn token, which is the end of a text.
Guide: experiments/docs/opdlm.md
"""

import os
import shutil
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # experiments/

import suite
import torch
from torch.nn.functional import cross_entropy
from toy_task import chains
from transformers import AutoModelForCausalLM, Qwen3Config

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.125,  # 1 / sqrt(hidden_size)
    "tie_word_embeddings": True,
}
ROWS = 30_000
BATCH = 64
STEPS = 500
LR = 3e-3


def causal_loss(model, ids, prompt_len, pad_id):
    """Mean cross-entropy of the answers' tokens, end-of-turn included, of ids (B, L)."""
    pos = torch.arange(1, ids.shape[1])  # (L - 1,)
    labels = ids[:, 1:]
    answer = (prompt_len[:, None] <= pos) & (labels != pad_id)  # (B, L - 1)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return cross_entropy(logits[answer], labels[answer])


@torch.no_grad()
def accuracy(model, tokenizer, ids, prompt_len):
    """The share of answers that greedy decoding gives as they are in ids (N, L)."""
    right = 0
    for row, length in zip(ids, prompt_len.tolist(), strict=True):
        answer = row[length:][row[length:] != tokenizer.pad_token_id]
        found = model.generate(
            row[None, :length],
            attention_mask=torch.ones(1, length, dtype=torch.long),
            max_new_tokens=len(answer),
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        right += found[0, length:].tolist() == answer.tolist()
    return right / len(ids)


def build(folder, train_rows=chains.TRAIN_ROWS, test_rows=chains.TEST_ROWS, pretrained=True):
    """Make `folder`/model and `folder`/data; both appear only when whole.

    Returns:
        the base's accuracy on 100 test problems; None without pretraining.
    """
    folder = Path(folder)
    chains.build(folder / "chains", wide=False, train_rows=train_rows, test_rows=test_rows)
    tokenizer = chains.build_tokenizer(wide=False)
    test, _, rows, _ = chains.splits(train_rows, test_rows, ROWS if pretrained else 0)
    tokenizer.eos_token = "<|eot_id|>"  # a text ends as a turn does
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        mask_token_id=tokenizer.convert_tokens_to_ids("<|mdm_mask|>"),
        **SHAPE,
    )
    torch.manual_seed(chains.SEED)
    model = AutoModelForCausalLM.from_config(config)
    share = None
    if pretrained:
        ids, prompt_len = chains.encode(tokenizer, rows)
        loss_of = partial(causal_loss, pad_id=tokenizer.pad_token_id)
        generator = torch.Generator().manual_seed(chains.SEED)
        chains.pretrain(model, loss_of, ids, prompt_len, STEPS, BATCH, LR, generator)
        share = accuracy(model.eval(), tokenizer, *chains.encode(tokenizer, test[:100]))
    unfinished = folder / "chains" / "unfinished"
    model.to(torch.bfloat16).save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    os.rename(folder / "chains" / "data", folder / "data")
    os.rename(unfinished, folder / "model")
    shutil.rmtree(folder / "chains")
    return share


def main(args):
    for name in ("model", "data", "chains"):
        if (Path(args.output) / name).exists():
            sys.exit(f"{args.output}/{name} exists already; give another folder")
    share = build(args.output)
    print(f"built {args.output}/model and {args.output}/data; greedy decoding: {share:.0%} right")


def parse_args(argv=None):
    parser = suite.make_parser(__doc__)
    parser.add_argument("--output", metavar="DIR", required=True, help="folder to make both in")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
