"""A model whose windows and blocks are a few tokens long, so that their edges come often and it compiles fast."""

import dsv4_jax

# Blocks of 12 tokens.
SMALL = dsv4_jax.DSV4Config.flash().replace(
    vocab_size=64, hidden_size=32, num_hidden_layers=3, compress_ratios=(0, 4, 6), csa_ratio=4, hca_ratio=6,
    sliding_window=8, max_position_embeddings=512, num_attention_heads=2, head_dim=48, rope_dim=16, q_lora_rank=16,
    o_lora_rank=8, o_groups=2, index_n_heads=2, index_head_dim=32, index_topk=4, rope_original_max_position=64,
    hc_mult=2, hc_sinkhorn_iters=4, n_routed_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
    num_hash_layers=1,
)  # fmt: skip
