"""A compact LLaDA: the architecture of LLaDA-8B with its module and parameter names, at any size.

A bidirectional transformer (Nie et al., "Large Language Diffusion Models", arXiv 2502.09992):
RMSNorm, rotary positions, attention that is never causal, SwiGLU, no biases, an untied head.
Loaded with `trust_remote_code=True`, as the real one is.

Shapes: B batch, L length, D width, H heads, K head width, V rows of embedding and head.
"""

from functools import partial

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention, silu
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_llada import LLaDAConfig


class RMSLayerNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in float32."""

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.d_model))
        self.eps = config.rms_norm_eps

    def forward(self, x):
        scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * (x.float() * scale).to(x.dtype)


def rotary_angles(length, config, device):
    """Angles position * theta^(-2i/K) of the rotary embedding, in both halves; (L, K) float32."""
    width = config.d_model // config.n_heads
    exponent = torch.arange(0, width, 2, device=device, dtype=torch.float32) / width
    positions = torch.arange(length, device=device, dtype=torch.float32)
    return torch.outer(positions, config.rope_theta**-exponent).repeat(1, 2)


def rotate(x, angles):
    """Turns the pairs (x_i, x_{i + K/2}) of x (B, H, L, K) by `angles`, in float32.

    These are (L, K), or (B, 1, L, K).
    """
    left, right = x.float().chunk(2, dim=-1)
    turned = torch.cat((-right, left), dim=-1)
    return (x.float() * angles.cos() + turned * angles.sin()).to(x.dtype)


class LLaDALlamaBlock(nn.Module):
    """x + attn_out(attention(attn_norm(x))), then x + ff_out(silu(ff_proj(h)) * up_proj(h))."""

    def __init__(self, config):
        super().__init__()
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_kv_heads
        width, kv_width = config.d_model, config.d_model // config.n_heads * config.n_kv_heads
        self.attn_norm = RMSLayerNorm(config)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_width, bias=False)
        self.v_proj = nn.Linear(width, kv_width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.ff_norm = RMSLayerNorm(config)
        self.ff_proj = nn.Linear(width, config.mlp_hidden_size, bias=False)
        self.up_proj = nn.Linear(width, config.mlp_hidden_size, bias=False)
        self.ff_out = nn.Linear(config.mlp_hidden_size, width, bias=False)

    def attention(self, x, angles, bias, keep):
        """x (B, L, D), angles (L, K), bias broadcastable to (B, H, L, L) or None -> (B, L, D).

        `keep` takes the keys and values of x and returns those to attend to; None: the same.
        """
        q = self.q_proj(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # (B, H, L, K)
        k = self.k_proj(x).unflatten(-1, (self.n_kv_heads, -1)).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (self.n_kv_heads, -1)).transpose(1, 2)
        if self.n_kv_heads != self.n_heads:
            k, v = (t.repeat_interleave(self.n_heads // self.n_kv_heads, dim=1) for t in (k, v))
        q, k = rotate(q, angles), rotate(k, angles)
        if keep is not None:
            k, v = keep(k, v)
        return (
            scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=False)
            .transpose(1, 2)
            .flatten(2)
        )

    def forward(self, x, angles, bias=None, keep=None):
        x = x + self.attn_out(self.attention(self.attn_norm(x), angles, bias, keep))
        h = self.ff_norm(x)
        return x + self.ff_out(silu(self.ff_proj(h)) * self.up_proj(h))


class LLaDAModel(nn.Module):
    """Embedding, blocks, final norm and head, under the name `transformer` as in LLaDA."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.embedding_size, config.d_model),
                "emb_drop": nn.Dropout(getattr(config, "embedding_dropout", 0.0)),
                "ln_f": RMSLayerNorm(config),
                "blocks": nn.ModuleList(LLaDALlamaBlock(config) for _ in range(config.n_layers)),
                "ff_out": nn.Linear(config.d_model, config.embedding_size, bias=False),
            }
        )

    def forward(
        self,
        input_ids,
        inputs_embeds=None,
        attention_mask=None,
        attention_bias=None,
        position_ids=None,
        key_values=None,
    ):
        """-> logits (B, L, V), and the hidden states that go into the head (B, L, D)."""
        x = self.transformer.wte(input_ids) if inputs_embeds is None else inputs_embeds  # (B, L, D)
        bias = None if attention_bias is None else attention_bias.to(x.dtype)
        if attention_mask is not None:
            hidden_keys = torch.zeros_like(attention_mask, dtype=x.dtype)
            hidden_keys = hidden_keys.masked_fill(attention_mask == 0, torch.finfo(x.dtype).min)[
                :, None, None
            ]
            bias = hidden_keys if bias is None else bias + hidden_keys
        columns = x.shape[1] if position_ids is None else attention_mask.shape[1]
        angles = rotary_angles(columns, self.config, x.device)
        if position_ids is not None:
            angles = angles[position_ids][:, None]  # (B, 1, L, K)
        x = self.transformer.emb_drop(x)
        for number, block in enumerate(self.transformer.blocks):
            if key_values is None:
                x = block(x, angles, bias)
            else:
                x = block(x, angles, bias, partial(key_values.update, number))
        x = self.transformer.ln_f(x)
        return self.transformer.ff_out(x), x


class LLaDAModelLM(PreTrainedModel):
    """LLaDA with a language-model head; `forward` gives logits and, like LLaDA's, never a loss."""

    config_class = LLaDAConfig
    base_model_prefix = "model"
    _no_split_modules = ["LLaDALlamaBlock"]

    def __init__(self, config):
        super().__init__(config)
        self.model = LLaDAModel(config)
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.init_std)

    def get_input_embeddings(self):
        return self.model.transformer.wte

    def set_input_embeddings(self, value):
        self.model.transformer.wte = value

    def get_output_embeddings(self):
        return self.model.transformer.ff_out

    def set_output_embeddings(self, value):
        self.model.transformer.ff_out = value

    def forward(
        self,
        input_ids=None,
        inputs_embeds=None,
        attention_mask=None,
        attention_bias=None,
        past_key_values=None,
        labels=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        cache_position=None,
        position_ids=None,
        key_values=None,
    ):
        """Logits of every position, from every position.

        Args:
            input_ids: (B, L), or `inputs_embeds` (B, L, D) instead.
            attention_mask: (B, L), 0 hides a key from all queries.
            attention_bias: added to the attention scores, broadcastable to (B, H, L, L).
            position_ids: (B, L) of the inputs, which are then a part of the columns that
                attention_mask is about.
            key_values: its `update` takes a layer's number, and the keys and values of the inputs,
                and returns those to attend to.

        Returns:
            `CausalLMOutputWithPast` with `logits` (B, L, V).

        Raises:
            ValueError: for a cache, labels or attention weights, which this model does not have.
        """
        if past_key_values is not None or use_cache or labels is not None or output_attentions:
            raise ValueError(
                "this LLaDA has no cache, no loss of its own and returns no attention weights"
            )
        logits, hidden = self.model(
            input_ids, inputs_embeds, attention_mask, attention_bias, position_ids, key_values
        )
        hidden_states = (hidden,) if output_hidden_states else None
        output = CausalLMOutputWithPast(logits=logits, hidden_states=hidden_states)
        return output.to_tuple() if return_dict is False else output
