"""The bridge between training and decoding: corruption makes the states that decoding meets.

Block decoding shows the model a clean prefix, a partly masked active block, and [MASK] after it up
to the end of the canvas. Blockwise corruption makes the same states with canvases of MAX_LEN and
MASK_PADDING, for answers of whole blocks.
"""

import pytest
import torch
from helpers import (
    EOS,
    MASK,
    VOCABULARY,
    constants,
    decode_one,
    prompts_of,
    small_llada,
    without_mask,
)

import train_blockwise
import train_fullseq

BLOCK = 4
GEN_LENGTH = 12


def args_of(trainer):
    """The constants of `trainer` for these small canvases; train_fullseq.py reads no BLOCK_SIZE."""
    return constants(trainer, MASK_ID=MASK, MASK_PADDING=True, MASK_PROB_EPS=0.0, BLOCK_SIZE=BLOCK)


def decoded(model, prompt, **options):
    """The answer to `prompt`, without end tokens, and the canvases (L,) shown to the model."""
    size = {"gen_length": GEN_LENGTH, "block_length": BLOCK, "steps": 6}
    ends = {"logits_eos_inf": True, "eot_id": EOS}
    answer, canvases = decode_one(model, prompt, **{**size, **options, **ends})
    assert MASK not in answer
    return answer, canvases


def corrupted(input_ids, prompt_len, length, block, masked):
    """The noisy_ids (L,) of a sample (L,) whose noise is low exactly where `masked` (L,)."""
    t = torch.tensor([0.5])
    noise = torch.cat([t, torch.where(masked, 0.25, 0.75)])[None]  # (1, 1 + L)
    noisy_ids, _ = train_blockwise.corrupt(
        args_of(train_blockwise),
        input_ids[None],
        torch.tensor([[prompt_len]]),
        torch.tensor([[length]]),
        torch.tensor([[block * BLOCK]]),
        noise,
    )
    return noisy_ids[0]


def first_masked_block(canvas, prompt_len):
    """The number of the block with the first [MASK] of an answer."""
    return int((canvas[prompt_len:] == MASK).nonzero()[0]) // BLOCK


def is_a_state_of_decoding(canvas, prompt_len):
    """Whether a canvas (L,) has a [MASK], and nothing but [MASK] after the block with the first."""
    answer = canvas[prompt_len:]
    if MASK not in answer:
        return False
    after = (first_masked_block(canvas, prompt_len) + 1) * BLOCK
    return bool((answer[after:] == MASK).all())


@pytest.mark.parametrize("prompt_len", [1, 5, 9])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"steps": 12},
        {"steps": 3},
        {"threshold": 0.4},
        {"remasking": "random"},
        {"temperature": 1.0},
    ],
)
def test_every_canvas_is_one_that_blockwise_corruption_makes(options, prompt_len):
    (prompt,) = prompts_of(torch.Generator().manual_seed(27), prompt_len)
    answer, canvases = decoded(without_mask(small_llada(27)), prompt, **options)
    # an answer as long as the canvas, and one of whole blocks that is shorter
    for end in (GEN_LENGTH, 2 * BLOCK):
        padding = torch.full((GEN_LENGTH - end,), EOS)
        sample = torch.cat([prompt, answer[:end], padding])
        blocks = set()
        for canvas in canvases:
            block = first_masked_block(canvas, prompt_len)
            if block * BLOCK < end:
                blocks.add(block)
                made = corrupted(sample, prompt_len, prompt_len + end, block, canvas == MASK)
                assert made.equal(canvas)
        assert len(blocks) == end // BLOCK


def test_a_partial_last_block_differs():
    """Decoding also fills the last block after the answer's end; training never masks it."""
    prompt = torch.tensor([1, 2])
    answer = torch.tensor([10, 11, 12, 13, 14, EOS])
    sample = torch.cat([prompt, answer, torch.full((6,), EOS)])
    # the second block, positions 6 to 9: two tokens after the end are committed, one before is not
    canvas = sample.clone()
    canvas[[6, 10, 11, 12, 13]] = MASK
    assert is_a_state_of_decoding(canvas, 2)
    made = corrupted(sample, 2, 8, 1, canvas == MASK)
    assert not made.equal(canvas)
    assert made[:8].equal(canvas[:8])  # the same up to the end


def share_of_states(trainer, blocks):
    """The share of 400 corrupted samples, with t ~ U(0, 1), that are states of decoding."""
    rng = torch.Generator().manual_seed(0)
    input_ids = torch.randint(8, VOCABULARY, (400, 5 + GEN_LENGTH), generator=rng)
    noise = torch.rand(400, 1 + 5 + GEN_LENGTH, generator=rng)
    prompt_len = torch.full((400, 1), 5)
    length = torch.full((400, 1), 5 + GEN_LENGTH)
    offset = torch.arange(400)[:, None] % blocks * BLOCK
    args = args_of(trainer)
    noisy_ids, loss_mask = trainer.corrupt(args, input_ids, prompt_len, length, offset, noise)
    supervised = noisy_ids[loss_mask.any(1)]
    states = [is_a_state_of_decoding(canvas, 5) for canvas in supervised]
    return sum(states) / len(states)


def test_full_sequence_corruption_makes_states_that_decoding_never_meets():
    assert share_of_states(train_blockwise, GEN_LENGTH // BLOCK) == 1
    assert share_of_states(train_fullseq, 1) < 0.5
    _, canvases = decoded(without_mask(small_llada(27)), torch.tensor([1, 2, 3]))
    assert all(is_a_state_of_decoding(canvas, 3) for canvas in canvases)
