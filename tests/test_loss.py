"""The loss against its definition, and the selected head against the full logits."""

import pytest
import torch
from helpers import VOCABULARY, small_llada
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy, linear

ROWS, L = 5, 24


@pytest.fixture
def model():
    return small_llada()


def batch(empty_rows=()):
    torch.manual_seed(1)
    input_ids = torch.randint(VOCABULARY, (ROWS, L))
    loss_mask = torch.rand(ROWS, L) < 0.5
    loss_mask[2] = torch.arange(L) == 7  # a row with one token
    assert loss_mask.sum() > 32  # tokens: the loss is taken in pieces
    loss_mask[list(empty_rows)] = False
    return input_ids, input_ids.masked_fill(loss_mask, VOCABULARY - 1), loss_mask


def definition(model, input_ids, noisy_ids, loss_mask):
    """Mean over rows of the mean over masked positions, from the full logits, in plain loops."""
    logits, total = model(input_ids=noisy_ids).logits, 0.0
    for row in range(ROWS):
        losses = [
            cross_entropy(logits[row, i], input_ids[row, i]) for i in range(L) if loss_mask[row, i]
        ]
        total = total + (sum(losses) / len(losses) if losses else 0.0)
    return total / ROWS


@pytest.mark.parametrize("empty_rows", [(), (1, 3)])
def test_loss_and_gradients_are_those_of_the_definition(trainer, args, model, empty_rows):
    rows = batch(empty_rows)
    gradients = []
    for loss in (trainer.supervised_loss(args, model, *rows), definition(model, *rows)):
        model.zero_grad()
        loss.backward()
        gradients.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_no_supervised_position_at_all(trainer, args, model):
    """Zero, and still part of the graph: a rank with such a micro-batch takes part in the step."""
    loss = trainer.supervised_loss(args, model, *batch(empty_rows=range(ROWS)))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_only_supervised_positions_reach_the_head(trainer, args, model):
    seen = []
    model.get_output_embeddings().register_forward_hook(
        lambda _, inputs, output: seen.append(output.shape)
    )
    rows = batch()
    trainer.supervised_loss(args, model, *rows)
    assert seen == [(rows[2].sum(), VOCABULARY)]
    assert model(input_ids=rows[0]).logits.shape == (
        ROWS,
        L,
        VOCABULARY,
    )  # and the model is as before


def test_through_an_adapter(trainer, args, model):
    rows = batch()
    expected = definition(model, *rows)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    torch.testing.assert_close(trainer.supervised_loss(args, wrapped, *rows), expected)


class Tied(torch.nn.Module):
    """A head that is the embedding: its logits do not pass through a module of their own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.wte = torch.nn.Embedding(VOCABULARY, 8)

    def get_output_embeddings(self):
        return self.wte

    def forward(self, input_ids):
        output = torch.nn.Module()
        output.logits = linear(self.wte(input_ids), self.wte.weight)
        return output


def test_tied_head(trainer, args):
    rows = batch()
    torch.testing.assert_close(
        trainer.supervised_loss(args, Tied(), *rows), definition(Tied(), *rows)
    )
