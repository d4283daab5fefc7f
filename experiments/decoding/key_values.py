"""Keys and values that are kept while a block is decoded: the approximate caches of Fast-dLLM.

In a model that attends to all positions, every committed token changes the keys and values of all
others. `prefix` keeps those of the prompt and of finished blocks as they were at the last refresh;
`dual` those of later, masked blocks too (Wu et al., "Fast-dLLM", arXiv 2505.22618). A refresh
is a forward pass over the whole canvas, at a block's first step and every `refresh` steps; with
refresh 1 nothing is approximate.

Shapes: B prompts, R of them in a forward pass, L columns, W of them computed, K block length,
H heads, D their width.
"""

import torch

KINDS = ("prefix", "dual")


class KeyValues:
    """Those of all layers of the project's LLaDA, from a pass over whole canvases."""

    def __init__(self, rows):
        self.rows = rows  # (R,) numbers of the prompts, ascending
        self.layers = []  # (keys, values) of each, (R, H, L, D)
        self.own = None  # (R,) which of them a later pass computes
        self.columns = None  # (R, W) where its keys and values go

    def update(self, number, keys, values):
        """The keys and values that layer `number` attends to, given those of its own positions."""
        if len(self.layers) == number:
            self.layers.append((keys, values))
            return keys, values
        columns = self.columns[:, None, :, None].expand_as(keys)
        whole_keys, whole_values = (kept[self.own] for kept in self.layers[number])
        return whole_keys.scatter(2, columns, keys), whole_values.scatter(2, columns, values)


def window(store, kind, canvas, prompt_lens, lengths, masked, start):
    """What the project's LLaDA takes to compute the block at `start` of the answers, as a dict.

    With "prefix" also what comes after it. See `decode.forward_inputs` for the rest.
    """
    rows = masked.any(1).nonzero()[:, 0]  # (R,)
    width = masked.shape[1] if kind == "dual" else int(lengths[0] - prompt_lens[0]) - start
    positions = prompt_lens[rows] + start + torch.arange(width, device=canvas.device)  # (R, W)
    store.own = torch.searchsorted(store.rows, rows)
    store.columns = positions
    columns = store.layers[0][0].shape[2]
    attended = torch.arange(columns, device=canvas.device) < lengths[rows]  # (R, L)
    return {
        "input_ids": canvas[rows].gather(1, positions),
        "attention_mask": attended.long(),
        "position_ids": positions,
        "key_values": store,
    }
