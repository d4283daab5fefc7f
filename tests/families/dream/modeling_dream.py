"""Qwen2 that attends in both directions and predicts from the position before, as Dream does."""

import torch
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM


class DreamConfig(Qwen2Config):
    model_type = "Dream"


class DreamModel(Qwen2ForCausalLM):
    """Loaded by AutoModel alone, with a generation_config.json beside it."""

    config_class = DreamConfig

    @classmethod
    def from_pretrained(cls, name, *arguments, **options):
        model = super().from_pretrained(name, *arguments, **options)
        model.generation_config = GenerationConfig.from_pretrained(name)  # fails without the file
        return model

    def forward(self, input_ids=None, attention_mask=None, **options):
        """attention_mask: None, "full", or (B, L), which becomes a mask of pairs (B, 1, L, L)."""
        if attention_mask is None or attention_mask == "full":
            attention_mask = torch.ones_like(input_ids)
        sees = attention_mask[:, None, None].bool() & attention_mask[:, None, :, None].bool()
        pairs = torch.zeros(sees.shape, dtype=self.dtype, device=sees.device)
        pairs = pairs.masked_fill(~sees, torch.finfo(self.dtype).min)
        return super().forward(input_ids=input_ids, attention_mask=pairs, **options)
