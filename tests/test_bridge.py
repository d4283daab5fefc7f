"""The bridge between training and decoding: blockwise corruption makes the states that block decoding meets.

Decoding meets a clean prefix, a partly masked active block, and [MASK] behind it up to the canvas' end. This is so for
canvases of MAX_LEN, with MASK_PADDING, up to the answer's end, and for answers of whole blocks.
"""

import itertools

import decode
import pytest
import torch
from test_decode import EOS, MASK, VOCABULARY, prompts_of, small_model

BLOCK, GEN_LENGTH = 4, 12


def met(model, prompt, **options):
    """The canvases that decoding `prompt` gives to the model, (L,) each, and the answer, (GEN_LENGTH,)."""
    canvases, how = [], {"gen_length": GEN_LENGTH, "block_length": BLOCK, "steps": 6, **options}
    ids = {"mask_id": MASK, "eos_id": EOS, "eot_id": EOS}
    (answer,) = decode.decode(
        model, [prompt], **how, **ids, watch=lambda _, canvas: canvases.append(canvas[0].clone())
    )
    return canvases, answer


def corrupted(trainer, input_ids, prompt_len, length, block, masked):
    """What `trainer.corrupt` makes of a sample (L,) if the noise is low exactly where `masked` (L,): noisy_ids (L,)."""
    noise = torch.cat([torch.tensor([0.5]), torch.where(masked, 0.25, 0.75)])[None]
    fields = (torch.tensor([[value]]) for value in (prompt_len, length, block))
    return trainer.corrupt(input_ids[None], *fields, noise)[0][0]


def is_met(canvas, prompt_len):
    """Whether some block of the (L,) canvas is partly masked, with all before it clean and all behind it masked."""
    masked = (canvas == MASK)[prompt_len:]
    first = int(masked.nonzero()[0]) // BLOCK * BLOCK if masked.any() else len(masked)
    return bool(masked.any() and masked[first + BLOCK :].all())


@pytest.fixture
def methods(blockwise, fullseq):
    for trainer in (blockwise, fullseq):
        trainer.MASK_ID, trainer.MASK_PADDING, trainer.MASK_PROB_EPS = MASK, True, 0.0
    blockwise.BLOCK_SIZE = BLOCK
    return blockwise, fullseq


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
def test_every_canvas_is_one_that_blockwise_corruption_makes(methods, options):
    blockwise, model = methods[0], small_model(27)
    ends = (
        GEN_LENGTH,
        2 * BLOCK,
    )  # an answer as long as the canvas, and one of whole blocks that is shorter
    for prompt, end in itertools.product(
        prompts_of(torch.Generator().manual_seed(27), 1, 5, 9), ends
    ):
        canvases, answer = met(model, prompt, logits_eos_inf=True, **options)
        assert MASK not in answer and len(canvases) >= 3
        sample = torch.cat([prompt, answer[:end], torch.full((GEN_LENGTH - end,), EOS)])
        active = [int((canvas[len(prompt) :] == MASK).nonzero()[0]) // BLOCK for canvas in canvases]
        up_to_end = [
            (canvas, block)
            for canvas, block in zip(canvases, active, strict=True)
            if block * BLOCK < end
        ]
        assert len({block for _, block in up_to_end}) == end // BLOCK
        for canvas, block in up_to_end:
            made = corrupted(
                blockwise, sample, len(prompt), len(prompt) + end, block, canvas == MASK
            )
            assert made.equal(canvas)


def test_a_partial_last_block_is_met_otherwise(methods):
    """What the README says: decoding also fills what is behind the answer's end in its last block; training never."""
    blockwise, prompt, answer = (
        methods[0],
        torch.tensor([1, 2]),
        torch.tensor([10, 11, 12, 13, 14, EOS]),
    )
    sample = torch.cat([prompt, answer, torch.full((6,), EOS)])
    canvas = sample.clone()
    canvas[[6, 10, 11, 12, 13]] = (
        MASK  # in the second block, two tokens behind the end are committed, one before is not
    )
    made = corrupted(blockwise, sample, 2, 8, 1, canvas == MASK)
    assert is_met(canvas, 2) and not made.equal(canvas)
    assert made[:8].equal(canvas[:8])  # up to the end it is the same


def test_full_sequence_corruption_makes_what_decoding_never_meets(methods):
    """Of 400 draws each, with t ~ U(0, 1): all of blockwise, and few of full-sequence."""
    blockwise, fullseq = methods
    rng, share = torch.Generator().manual_seed(0), {}
    input_ids = torch.randint(8, VOCABULARY, (400, 5 + GEN_LENGTH), generator=rng)
    fields = (torch.full((400, 1), 5), torch.full((400, 1), 5 + GEN_LENGTH))
    for name, trainer in (("blockwise", blockwise), ("fullseq", fullseq)):
        block = (
            torch.arange(400)[:, None] % (GEN_LENGTH // BLOCK)
            if name == "blockwise"
            else torch.zeros(400, 1).long()
        )
        noise = torch.rand(400, 1 + 5 + GEN_LENGTH, generator=rng)
        noisy, supervised = trainer.corrupt(input_ids, *fields, block, noise)
        states = [
            is_met(canvas, 5) for canvas, mask in zip(noisy, supervised, strict=True) if mask.any()
        ]
        share[name] = sum(states) / len(states)
    assert share["blockwise"] == 1 and share["fullseq"] < 0.5
    model, prompt = small_model(27), torch.tensor([1, 2, 3])
    assert all(is_met(canvas, 3) for canvas in met(model, prompt, logits_eos_inf=True)[0])
