"""Configuration of a compact LLaDA; the defaults are the shape of LLaDA-8B."""

from transformers import PretrainedConfig


class LLaDAConfig(PretrainedConfig):
    """LLaDA's shape under LLaDA's own keys; unknown keys are kept as attributes.

    Args:
        d_model, n_layers, n_heads: width, depth and attention heads.
        n_kv_heads: key and value heads; `None` means `n_heads`.
        mlp_hidden_size: width of the SwiGLU; `None` means `mlp_ratio * d_model`.
        vocab_size: ids that the tokenizer can give; embedding_size: rows of embedding and head.
        rope_theta: base of the rotary embedding. rms_norm_eps: added to the mean square.
        mask_token_id: the id of `[MASK]`.
    """

    model_type = "llada"

    def __init__(
        self,
        d_model=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=None,
        mlp_ratio=4,
        mlp_hidden_size=12288,
        vocab_size=126464,
        embedding_size=None,
        max_sequence_length=4096,
        rope_theta=500000.0,
        rms_norm_eps=1e-5,
        init_std=0.02,
        mask_token_id=126336,
        pad_token_id=126081,
        eos_token_id=126081,
        weight_tying=False,
        use_cache=False,
        **kwargs,
    ):
        if weight_tying:
            raise ValueError("weight_tying = True: this LLaDA has an untied head only")
        if d_model % n_heads or n_heads % (n_kv_heads or n_heads):
            raise ValueError(
                f"n_heads = {n_heads} must divide d_model = {d_model} "
                f"and be a multiple of n_kv_heads = {n_kv_heads}"
            )
        self.d_model = d_model
        self.n_layers = n_layers
        self.n_heads = n_heads
        self.n_kv_heads = n_kv_heads or n_heads
        self.mlp_ratio = mlp_ratio
        self.mlp_hidden_size = mlp_hidden_size or mlp_ratio * d_model
        self.vocab_size = vocab_size
        self.embedding_size = embedding_size or vocab_size
        self.max_sequence_length = max_sequence_length
        self.rope_theta = rope_theta
        self.rms_norm_eps = rms_norm_eps
        self.init_std = init_std
        self.mask_token_id = mask_token_id
        self.weight_tying = weight_tying
        self.use_cache = use_cache
        kwargs["tie_word_embeddings"] = False
        super().__init__(pad_token_id=pad_token_id, eos_token_id=eos_token_id, **kwargs)
