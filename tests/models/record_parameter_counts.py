#!/usr/bin/env python3
"""Records how many parameters Hugging Face transformers and torchvision give to networks they build
without weights, for tests/models to compare with.

  pip install torch torchvision transformers
  python3 tests/models/record_parameter_counts.py tests/data/models/parameter_counts.json

The configurations are made up, so that every option that changes a shape occurs with and without; the
published ones repeat the numbers of the models' public cards. Nothing is downloaded.
"""
import json
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torchvision
import transformers

LLAMA = dict(model_type="llama", vocab_size=96, hidden_size=48, intermediate_size=112,
             num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
             max_position_embeddings=64)
LLAMA_8B = dict(model_type="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336,
                num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
                max_position_embeddings=8192)
GPT2 = dict(model_type="gpt2", vocab_size=97, n_positions=40, n_embd=24, n_layer=2, n_head=3)
MOE = dict(LLAMA, num_local_experts=5, num_experts_per_tok=2)
QWEN3 = dict(LLAMA, model_type="qwen3", head_dim=10)
QWEN3_MOE = dict(LLAMA, model_type="qwen3_moe", head_dim=10, num_experts=6, num_experts_per_tok=2,
                 moe_intermediate_size=20, num_hidden_layers=5)
DEEPSEEK = dict(vocab_size=96, hidden_size=48, intermediate_size=112, num_hidden_layers=4,
                num_attention_heads=6, num_key_value_heads=6, max_position_embeddings=64,
                q_lora_rank=20, kv_lora_rank=12, qk_nope_head_dim=10, qk_rope_head_dim=6,
                v_head_dim=14, n_routed_experts=8, num_experts_per_tok=3, n_group=2, topk_group=1,
                moe_intermediate_size=18, n_shared_experts=2, first_k_dense_replace=1)
DEEPSEEK_2 = dict(DEEPSEEK, model_type="deepseek_v2")
DEEPSEEK_3 = dict(DEEPSEEK, model_type="deepseek_v3")
GPT_OSS = dict(model_type="gpt_oss", vocab_size=96, hidden_size=48, intermediate_size=30,
               num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, head_dim=10,
               num_local_experts=5, num_experts_per_tok=2, max_position_embeddings=64)
NEMOTRON = dict(LLAMA, model_type="nemotron")
HYBRID = dict(model_type="nemotron_h", vocab_size=96, hidden_size=48, intermediate_size=30,
              num_hidden_layers=4, hybrid_override_pattern="M*-E", num_attention_heads=6,
              num_key_value_heads=2, head_dim=10, mamba_num_heads=6, mamba_head_dim=5, n_groups=2,
              ssm_state_size=7, conv_kernel=3, n_routed_experts=5, num_experts_per_tok=2,
              moe_intermediate_size=20, moe_shared_expert_intermediate_size=11)
NEMOTRON_H = dict(model_type="nemotron_h", vocab_size=131072, num_attention_heads=32,
                  num_key_value_heads=8, head_dim=128, ssm_state_size=128, mamba_num_heads=128,
                  mamba_head_dim=64, n_groups=8, conv_kernel=4)
PARALLEL = {k: v for k, v in LLAMA.items() if k not in ("model_type", "num_key_value_heads")}
FALCON = dict(model_type="falcon", vocab_size=96, hidden_size=48, num_hidden_layers=3,
              num_attention_heads=6)
GPTJ = dict(model_type="gptj", vocab_size=97, n_positions=40, n_embd=24, n_layer=2, n_head=3,
            rotary_dim=4)
OPT = dict(model_type="opt", vocab_size=97, hidden_size=24, num_hidden_layers=2,
           num_attention_heads=3, ffn_dim=60, max_position_embeddings=40, word_embed_proj_dim=24)
MAMBA = dict(model_type="mamba2", vocab_size=96, hidden_size=24, num_hidden_layers=3, num_heads=6,
             head_dim=8, n_groups=2, state_size=7, conv_kernel=3)
GEMMA = dict(LLAMA, head_dim=10)
ENCODER = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=60)
BERT = dict(ENCODER, model_type="bert", vocab_size=97, max_position_embeddings=40, type_vocab_size=2)
VIT = dict(ENCODER, model_type="vit", image_size=32, patch_size=8, num_channels=3, num_labels=10)

CONFIGURATIONS = {
    "llama": LLAMA,
    "llama, one key per query": {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"},
    "llama, tied": dict(LLAMA, tie_word_embeddings=True),
    "llama, biases": dict(LLAMA, attention_bias=True, mlp_bias=True),
    "llama, wide heads": dict(LLAMA, head_dim=20),
    "mistral": dict(LLAMA, model_type="mistral", sliding_window=16),
    "mistral, no window": dict(LLAMA, model_type="mistral", sliding_window=None, head_dim=12),
    "mixtral": dict(MOE, model_type="mixtral"),
    "gpt2": GPT2,
    "gpt2, narrow": dict(GPT2, n_inner=50, tie_word_embeddings=False),
    "qwen2": dict(LLAMA, model_type="qwen2"),
    "qwen2, tied, sliding": dict(LLAMA, model_type="qwen2", tie_word_embeddings=True,
                                 use_sliding_window=True, sliding_window=16, max_window_layers=1),
    "qwen3": QWEN3,
    "qwen3, biases": dict(QWEN3, attention_bias=True),
    "qwen3_moe": QWEN3_MOE,
    "qwen3_moe, some dense": dict(QWEN3_MOE, decoder_sparse_step=2, mlp_only_layers=[3]),
    "deepseek_v2": DEEPSEEK_2,
    "deepseek_v2, direct queries": dict(DEEPSEEK_2, q_lora_rank=None),
    "deepseek_v2, biases": dict(DEEPSEEK_2, attention_bias=True, mlp_bias=True),
    "deepseek_v3": DEEPSEEK_3,
    "deepseek_v3, direct queries, biases": dict(DEEPSEEK_3, q_lora_rank=None, attention_bias=True),
    "gpt_oss": GPT_OSS,
    "gpt_oss, no biases": dict(GPT_OSS, attention_bias=False),
    "nemotron": NEMOTRON,
    "nemotron, biases": dict(NEMOTRON, attention_bias=True, mlp_bias=True),
    "nemotron_h": HYBRID,
    "nemotron_h, latent experts, no bias": dict(
        HYBRID, hybrid_override_pattern="MEM", num_hidden_layers=3, moe_latent_size=9,
        use_conv_bias=False, mlp_bias=True),
    "nemotron_h, a list": dict(
        {k: v for k, v in HYBRID.items() if k != "hybrid_override_pattern"}, num_hidden_layers=3,
        layers_block_type=["linear_attention", "full_attention", "mlp"], tie_word_embeddings=True),
    "gemma": dict(GEMMA, model_type="gemma"),
    "gemma2": dict(GEMMA, model_type="gemma2"),
    "gemma3_text": dict(GEMMA, model_type="gemma3_text"),
    "gemma3_text, untied, biases": dict(GEMMA, model_type="gemma3_text", tie_word_embeddings=False,
                                        attention_bias=True),
    "phi3": dict(LLAMA, model_type="phi3", pad_token_id=0),
    "starcoder2": dict(LLAMA, model_type="starcoder2"),
    "starcoder2, no biases": dict(LLAMA, model_type="starcoder2", use_bias=False),
    "gpt_neox": dict(PARALLEL, model_type="gpt_neox"),
    "gpt_neox, in turn, no biases": dict(PARALLEL, model_type="gpt_neox", attention_bias=False,
                                         use_parallel_residual=False),
    "gptj": GPTJ,
    "gptj, narrow": dict(GPTJ, n_inner=50),
    "falcon": FALCON,
    "falcon, in turn, biases": dict(FALCON, parallel_attn=False, bias=True),
    "falcon, as many keys": dict(FALCON, multi_query=False),
    "falcon, two norms": dict(FALCON, new_decoder_architecture=True, num_kv_heads=2),
    "falcon, one norm": dict(FALCON, new_decoder_architecture=True, num_kv_heads=3,
                             num_ln_in_parallel_attn=1, ffn_hidden_size=50),
    "phi": dict(LLAMA, model_type="phi"),
    "cohere": dict(LLAMA, model_type="cohere", pad_token_id=0),
    "cohere, untied, biases": dict(LLAMA, model_type="cohere", pad_token_id=0, attention_bias=True,
                                   tie_word_embeddings=False),
    "stablelm": dict(LLAMA, model_type="stablelm"),
    "stablelm, parallel, biases": dict(LLAMA, model_type="stablelm", use_qkv_bias=True,
                                       use_parallel_residual=True),
    "opt": OPT,
    "opt, no biases": dict(OPT, enable_bias=False),
    "gpt_bigcode": dict(GPT2, model_type="gpt_bigcode"),
    "gpt_bigcode, as many keys": dict(GPT2, model_type="gpt_bigcode", multi_query=False),
    "mamba2": MAMBA,
    "mamba2, tied, no bias": dict(MAMBA, tie_word_embeddings=True, use_conv_bias=False),
    "bert": BERT,
    "vit": VIT,
    "vit, no qkv bias": dict(VIT, qkv_bias=False),
    "Llama-3-8B": LLAMA_8B,
    "Llama-3-70B": dict(LLAMA_8B, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
                        num_attention_heads=64),
    "Llama-3.1-405B": dict(LLAMA_8B, hidden_size=16384, intermediate_size=53248,
                           num_hidden_layers=126, num_attention_heads=128),
    "Llama-2-7b": dict(LLAMA_8B, vocab_size=32000, intermediate_size=11008, num_key_value_heads=32),
    "Llama-3.2-1B": dict(LLAMA_8B, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                         head_dim=64, tie_word_embeddings=True),
    "Mistral-7B-v0.1": dict(LLAMA_8B, model_type="mistral", vocab_size=32000),
    "Mixtral-8x7B": dict(LLAMA_8B, model_type="mixtral", vocab_size=32000, num_local_experts=8,
                         num_experts_per_tok=2),
    "gpt2 (124M)": dict(GPT2, vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12, n_head=12),
    "Qwen2-7B": dict(model_type="qwen2", vocab_size=152064, hidden_size=3584,
                     intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
                     num_key_value_heads=4, max_position_embeddings=131072),
    "Qwen3-8B": dict(model_type="qwen3", vocab_size=151936, hidden_size=4096,
                     intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
                     num_key_value_heads=8, head_dim=128, max_position_embeddings=40960),
    "Qwen3-30B-A3B": dict(model_type="qwen3_moe", vocab_size=151936, hidden_size=2048,
                          intermediate_size=6144, num_hidden_layers=48, num_attention_heads=32,
                          num_key_value_heads=4, head_dim=128, num_experts=128,
                          num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True,
                          max_position_embeddings=40960),
    "DeepSeek-V2": dict(model_type="deepseek_v2", vocab_size=102400, hidden_size=5120,
                        intermediate_size=12288, moe_intermediate_size=1536, num_hidden_layers=60,
                        num_attention_heads=128, num_key_value_heads=128, n_shared_experts=2,
                        n_routed_experts=160, num_experts_per_tok=6, first_k_dense_replace=1,
                        q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128,
                        qk_rope_head_dim=64, v_head_dim=128),
    "DeepSeek-V3": dict(model_type="deepseek_v3", vocab_size=129280, hidden_size=7168,
                        intermediate_size=18432, moe_intermediate_size=2048, num_hidden_layers=61,
                        num_attention_heads=128, num_key_value_heads=128, n_shared_experts=1,
                        n_routed_experts=256, num_experts_per_tok=8, first_k_dense_replace=3,
                        q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128,
                        qk_rope_head_dim=64, v_head_dim=128),
    "gpt-oss-20b": dict(model_type="gpt_oss", vocab_size=201088, hidden_size=2880,
                        intermediate_size=2880, num_hidden_layers=24, num_attention_heads=64,
                        num_key_value_heads=8, head_dim=64, num_local_experts=32,
                        num_experts_per_tok=4),
    "Minitron-4B-Base": dict(model_type="nemotron", vocab_size=256000, hidden_size=3072,
                             intermediate_size=9216, num_hidden_layers=32, num_attention_heads=24,
                             num_key_value_heads=8, head_dim=128),
    "Nemotron-H-8B-Base-8K": dict(
        NEMOTRON_H, hidden_size=4096, intermediate_size=21504, num_hidden_layers=52,
        hybrid_override_pattern="M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"),
    "NVIDIA-Nemotron-3-Nano-30B-A3B": dict(
        NEMOTRON_H, hidden_size=2688, num_key_value_heads=2, mamba_num_heads=64,
        hybrid_override_pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
        num_hidden_layers=52, n_routed_experts=128, num_experts_per_tok=6,
        moe_intermediate_size=1856, moe_shared_expert_intermediate_size=3712),
    "NVIDIA-Nemotron-3-Super-120B-A12B": dict(
        NEMOTRON_H, hidden_size=4096, num_key_value_heads=2, num_hidden_layers=88,
        hybrid_override_pattern="MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*"
                                "EMEMEMEMEM*EMEMEMEM*EMEMEMEME",
        n_routed_experts=512, num_experts_per_tok=22, moe_intermediate_size=2688,
        moe_shared_expert_intermediate_size=5376, moe_latent_size=1024),
    "bert-large-uncased": dict(model_type="bert", vocab_size=30522, hidden_size=1024,
                               num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
                               max_position_embeddings=512),
    "vit-base-patch16-224": dict(model_type="vit", hidden_size=768, num_hidden_layers=12,
                                 num_attention_heads=12, intermediate_size=3072, image_size=224,
                                 patch_size=16, num_labels=1000),
}
TORCHVISION = {"resnet50": "resnet-50", "vgg16": "vgg-16", "alexnet": "alexnet", "vit_b_16": "vit-b-16",
               "resnet18": "resnet-18", "resnet34": "resnet-34", "resnet101": "resnet-101",
               "resnet152": "resnet-152", "efficientnet_b0": "efficientnet-b0",
               "efficientnet_b4": "efficientnet-b4", "efficientnet_b7": "efficientnet-b7"}
HEADS = {"bert": transformers.AutoModelForMaskedLM, "vit": transformers.AutoModelForImageClassification}


def count(model):
    """Each parameter once: tied ones are one object."""
    return sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())


def build(configuration):
    settings = dict(configuration)
    kind = settings.pop("model_type")
    config = transformers.AutoConfig.for_model(kind, **settings)
    with torch.device("meta"):
        model = HEADS.get(kind, transformers.AutoModelForCausalLM).from_config(config)
    model.tie_weights()
    return model


def main():
    rows = []
    for name, configuration in CONFIGURATIONS.items():
        rows.append({"name": name, "config": configuration, "parameters": count(build(configuration))})
        print(name, rows[-1]["parameters"], flush=True)
    networks = []
    for builder, name in TORCHVISION.items():
        with torch.device("meta"):
            networks.append({"name": name, "parameters": count(getattr(torchvision.models, builder)())})
    record = {
        "schema": "partita.parameter-counts/1",
        "recorded_by": "tests/models/record_parameter_counts.py",
        "transformers": transformers.__version__,
        "torchvision": torchvision.__version__,
        "torch": torch.__version__.split("+")[0],
        "configurations": rows,
        "networks": networks,
    }
    with open(sys.argv[1], "w") as file:
        json.dump(record, file, indent=1)
        file.write("\n")


if __name__ == "__main__":
    main()
