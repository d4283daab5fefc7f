"""Qwen3 that attends in both directions, as the A2D models do. Its head is tied."""

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM


class A2DQwen3Config(Qwen3Config):
    model_type = "a2d-qwen3"


class A2DQwen3LMHeadModel(Qwen3ForCausalLM):
    """Loaded as a masked LM alone; takes a 2-D mask of padding, or a 4-D one."""

    config_class = A2DQwen3Config

    def forward(self, input_ids=None, attention_mask=None, **options):
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)  # (B, L)
        if attention_mask.dim() == 2:
            sees = attention_mask[:, None, None].bool().expand(-1, 1, input_ids.shape[1], -1)
            attention_mask = torch.zeros(sees.shape, dtype=self.dtype, device=sees.device)
            attention_mask = attention_mask.masked_fill(~sees, torch.finfo(self.dtype).min)
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **options)
