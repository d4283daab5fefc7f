"""OLMoE that attends in both directions: a mixture of experts with LLaDA-MoE's module names."""

import torch
from transformers import OlmoeConfig, OlmoeForCausalLM


class LLaDAMoEConfig(OlmoeConfig):
    model_type = "llada_moe"


class LLaDAMoEModelLM(OlmoeForCausalLM):
    config_class = LLaDAMoEConfig

    def forward(self, input_ids=None, attention_mask=None, labels=None, **options):
        """attention_mask (B, L) hides keys; there is no loss."""
        if labels is not None:
            raise ValueError("labels are not supported")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        sees = attention_mask[:, None, None].bool().expand(-1, 1, input_ids.shape[1], -1)
        mask = torch.zeros(sees.shape, dtype=self.dtype, device=sees.device)
        mask = mask.masked_fill(~sees, torch.finfo(self.dtype).min)
        return super().forward(input_ids=input_ids, attention_mask=mask, **options)
