"""The networks of Hugging Face transformers: language, sound and some vision."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tests.networks.zoo import CHANNELS, FEATURES, Experts, Network, images, text, tokens, words


def transformers(
    model: str,
    config: str,
    inputs: Callable[[torch.Generator], dict[str, Any]],
    *,
    note: str = "",
    axes: Mapping[str, int | tuple[int, ...]] = FEATURES,
    gated: int = 0,
    unseen: Mapping[str, str] | None = None,
    experts: Mapping[str, Experts] | None = None,
    **options: Any,
) -> Network:
    def build() -> nn.Module:
        package = importlib.import_module("transformers")
        return getattr(package, model)(getattr(package, config)(**options))

    name = f"{model} ({note})" if note else model
    return Network("transformers", name, words(options), build, inputs, axes, gated, unseen or {}, experts or {})


_SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 256}
_LLAMA = {**_SMALL, "intermediate_size": 28, "num_key_value_heads": 1}
_T5 = {
    "vocab_size": 256,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 28,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_LM = tokens(labels=True)
_WAYS = ("eager", "batched_mm", "grouped_mm")


def _chosen(module: nn.Module, given: tuple[Any, ...], x: Tensor, times: int) -> Tensor:
    """The expert of each row, from the experts that were chosen for each token."""
    chosen, way = given[1], module.config._experts_implementation
    if way == "eager":  # one expert after another, without those that got no token
        return chosen.unique()[times].expand(len(x))
    return chosen.flatten() if way == "batched_mm" else chosen.flatten().sort().values


def _sizes(module: nn.Module, given: tuple[Any, ...], x: Tensor, times: int) -> Tensor:
    """The expert of each row, from the number of rows of each."""
    return torch.arange(len(given[1])).repeat_interleave(torch.tensor(given[1]))


def _not_zero(module: nn.Module, given: tuple[Any, ...], x: Tensor, times: int) -> Tensor:
    """The expert of each row: each is given every token, but zeros for the tokens that are not its own."""
    rows = given[0].view(*x.shape[:2], -1)
    return torch.where(rows.abs().amax(-1) > 0, torch.arange(len(x))[:, None], len(x)).flatten()


def _experts(width: int) -> dict[str, Experts]:
    return {"*.experts.act_fn": Experts("gate_up_proj", f"0:{width}", _chosen)}


TRANSFORMERS = (
    transformers(
        "OPTForCausalLM", "OPTConfig", _LM, **_SMALL, ffn_dim=28, max_position_embeddings=32, word_embed_proj_dim=16
    ),
    transformers(
        "GPT2LMHeadModel",
        "GPT2Config",
        _LM,
        vocab_size=256,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=32,
        bos_token_id=1,
        eos_token_id=2,
    ),
    transformers("GPTNeoXForCausalLM", "GPTNeoXConfig", _LM, **_SMALL, intermediate_size=28),
    transformers("BloomForCausalLM", "BloomConfig", _LM, vocab_size=256, hidden_size=16, n_layer=2, n_head=2),
    transformers("LlamaForCausalLM", "LlamaConfig", _LM, gated=2, **_LLAMA),
    transformers("MistralForCausalLM", "MistralConfig", _LM, gated=2, **_LLAMA),
    transformers("GemmaForCausalLM", "GemmaConfig", _LM, gated=2, **_LLAMA, head_dim=8),
    transformers("Qwen2ForCausalLM", "Qwen2Config", _LM, gated=2, **_LLAMA),
    transformers(
        "Phi3ForCausalLM", "Phi3Config", _LM, gated=2, **_LLAMA, pad_token_id=0, bos_token_id=1, eos_token_id=2
    ),
    transformers("NemotronForCausalLM", "NemotronConfig", _LM, **_LLAMA),
    transformers("BertForMaskedLM", "BertConfig", _LM, **_SMALL, intermediate_size=28),
    transformers("BertModel", "BertConfig", tokens(), **_SMALL, intermediate_size=28),
    transformers(
        "DistilBertForMaskedLM", "DistilBertConfig", _LM, vocab_size=256, dim=16, n_layers=2, n_heads=2, hidden_dim=28
    ),
    transformers("T5ForConditionalGeneration", "T5Config", _LM, note="ReLU", **_T5),
    transformers(
        "T5ForConditionalGeneration", "T5Config", _LM, note="gated GELU", gated=4, **_T5, feed_forward_proj="gated-gelu"
    ),
    transformers(
        "BartForConditionalGeneration",
        "BartConfig",
        _LM,
        vocab_size=256,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=28,
        decoder_ffn_dim=28,
        max_position_embeddings=32,
    ),
    *(
        transformers(
            "MixtralForCausalLM",
            "MixtralConfig",
            _LM,
            note=f"{way} experts",
            **_LLAMA,
            **_EXPERTS,
            experts_implementation=way,
            experts=_experts(28),
            gated=8,
        )
        for way in _WAYS
    ),
)


def _sounds(generator: torch.Generator) -> dict[str, Any]:
    return {"input_values": torch.randn(2, 1600, generator=generator)}


def _spectrograms(generator: torch.Generator) -> dict[str, Any]:
    sound = torch.randn(2, 20, 40, generator=generator)
    return {"input_features": sound, "decoder_input_ids": text(generator, 6)}


TRANSFORMERS += (
    transformers(
        "WhisperModel",
        "WhisperConfig",
        _spectrograms,
        vocab_size=256,
        num_mel_bins=20,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=28,
        decoder_ffn_dim=28,
        max_source_positions=20,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        axes={"encoder.gelu()*": 1, "*": -1},
    ),
    transformers(
        "Wav2Vec2Model",
        "Wav2Vec2Config",
        _sounds,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=28,
        conv_dim=(8, 8),
        conv_stride=(5, 4),
        conv_kernel=(10, 8),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        mask_time_prob=0.0,
        layerdrop=0.0,
        axes={"feature_extractor.*": 1, "encoder.pos_conv_embed.*": 1, "*": -1},
    ),
    transformers(
        "MobileViTModel",
        "MobileViTConfig",
        images(64, "pixel_values"),
        image_size=64,
        hidden_sizes=[16, 20, 24],
        neck_hidden_sizes=[8, 8, 12, 16, 20, 24, 40],
        num_attention_heads=2,
        axes={"*.intermediate.*": -1, "*": 1},
    ),
    transformers(
        "ViTModel",
        "ViTConfig",
        images(32, "pixel_values"),
        image_size=32,
        patch_size=8,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=28,
    ),
    transformers(
        "ResNetModel",
        "ResNetConfig",
        images(32, "pixel_values"),
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        axes=CHANNELS,
    ),
    transformers(
        "ConvNextModel", "ConvNextConfig", images(32, "pixel_values"), hidden_sizes=[8, 12], depths=[1, 1], num_stages=2
    ),
    transformers(
        "SegformerModel",
        "SegformerConfig",
        images(64, "pixel_values"),
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 8, 16, 16],
        num_attention_heads=[1, 1, 2, 2],
    ),
    transformers(
        "MambaForCausalLM",
        "MambaConfig",
        _LM,
        vocab_size=256,
        hidden_size=16,
        num_hidden_layers=2,
        state_size=4,
        gated=2,
        axes=CHANNELS,
    ),
)

_CAPS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 28}
TRANSFORMERS += (
    transformers("AlbertModel", "AlbertConfig", tokens(), **_SMALL, intermediate_size=28, embedding_size=8),
    transformers(
        "ModernBertModel",
        "ModernBertConfig",
        tokens(),
        **_SMALL,
        intermediate_size=28,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
        gated=2,
    ),
    transformers(
        "CLIPVisionModel", "CLIPVisionConfig", images(32, "pixel_values"), **_CAPS, image_size=32, patch_size=8
    ),
    transformers(
        "Dinov2Model",
        "Dinov2Config",
        images(28, "pixel_values"),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        use_swiglu_ffn=True,
        gated=2,
    ),
    transformers(
        "SqueezeBertModel",
        "SqueezeBertConfig",
        tokens(),
        **{**_SMALL, "hidden_size": 16},
        embedding_size=16,
        intermediate_size=32,
        axes={"*.intermediate*": 1, "*": -1},
    ),
    transformers(
        "Wav2Vec2ConformerModel",
        "Wav2Vec2ConformerConfig",
        _sounds,
        **_CAPS,
        conv_dim=(8, 8),
        conv_stride=(5, 4),
        conv_kernel=(10, 8),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        mask_time_prob=0.0,
        layerdrop=0.0,
        axes={"feature_extractor.*": 1, "encoder.pos_conv_embed.*": 1, "*.conv_module.*": 1, "*": -1},
    ),
    transformers(
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        _LM,
        **_LLAMA,
        moe_intermediate_size=20,
        shared_expert_intermediate_size=24,
        num_experts=4,
        num_experts_per_tok=2,
        experts=_experts(20),
        gated=10,
    ),
    *(
        transformers(
            "GptOssForCausalLM",
            "GptOssConfig",
            _LM,
            note=f"{way} experts",
            **_LLAMA,
            **_EXPERTS,
            head_dim=8,
            pad_token_id=0,
            experts_implementation=way,
            experts={"*.experts.sigmoid()": Experts("gate_up_proj", "0:55:2", _chosen, swish=True)},
            gated=8,
        )
        for way in _WAYS
    ),
    transformers(
        "SwitchTransformersModel",
        "SwitchTransformersConfig",
        tokens(decoder_input_ids=True),
        **_T5,
        num_experts=4,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
    ),
    transformers("FalconForCausalLM", "FalconConfig", _LM, **_SMALL),
    transformers("PhiForCausalLM", "PhiConfig", _LM, **_LLAMA),
    transformers(
        "RwkvForCausalLM",
        "RwkvConfig",
        _LM,
        vocab_size=256,
        hidden_size=16,
        num_hidden_layers=2,
        attention_hidden_size=16,
        intermediate_size=28,
        context_length=16,
        gated=4,
    ),
    transformers(
        "FNetModel", "FNetConfig", tokens(), vocab_size=256, hidden_size=16, num_hidden_layers=2, intermediate_size=28
    ),
    transformers("DebertaV2Model", "DebertaV2Config", tokens(), **_SMALL, intermediate_size=28),
    transformers(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        _LM,
        **_LLAMA,
        intermediate_size_mlp=28,
        num_local_experts=4,
        num_experts_per_tok=1,
        head_dim=8,
        experts={"*.experts.act_fn": Experts("gate_up_proj", "0:28", _not_zero)},
        gated=10,
    ),
    *(
        transformers(
            "DeepseekV3ForCausalLM",
            "DeepseekV3Config",
            _LM,
            note=f"{way} experts",
            vocab_size=256,
            hidden_size=16,
            intermediate_size=28,
            moe_intermediate_size=20,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            n_routed_experts=4,
            n_group=1,
            topk_group=1,
            num_experts_per_tok=2,
            kv_lora_rank=8,
            q_lora_rank=8,
            qk_rope_head_dim=4,
            v_head_dim=8,
            qk_nope_head_dim=8,
            first_k_dense_replace=1,
            experts_implementation=way,
            experts=_experts(20),
            gated=6,
        )
        for way in _WAYS
    ),
)


def _mixtures() -> Iterator[Network]:
    """The mixtures of experts that transformers runs in several ways, in each of them."""
    llama = {**_LLAMA, "num_experts_per_tok": 2}
    known: tuple[tuple[str, str, int, int, dict[str, Any]], ...] = (
        ("Qwen3Moe", "ForCausalLM", 20, 8, {"moe_intermediate_size": 20, "num_experts": 4, "head_dim": 8}),
        ("Olmoe", "ForCausalLM", 28, 8, {"num_experts": 4}),
        ("GraniteMoe", "ForCausalLM", 28, 8, {"num_local_experts": 4}),
        ("Phimoe", "ForCausalLM", 28, 8, {"num_local_experts": 4}),
    )
    for name, task, width, gated, more in known:
        for way in _WAYS:
            yield transformers(
                name + task,
                name + "Config",
                _LM,
                note=f"{way} experts",
                **llama,
                **more,
                experts_implementation=way,
                experts=_experts(width),
                gated=gated,
            )
    yield transformers(
        "JetMoeForCausalLM",
        "JetMoeConfig",
        _LM,
        vocab_size=256,
        hidden_size=16,
        num_hidden_layers=2,
        num_key_value_heads=2,
        kv_channels=8,
        intermediate_size=28,
        **_EXPERTS,
        experts={"*.mlp.activation": Experts("input_linear", "0:28", _sizes, of="input_linear")},
        gated=8,
    )


TRANSFORMERS += (*_mixtures(),)

#: Networks of whose other activations the twin sees a part: they call the functions of kernels that are missing here.
MAMBAS = tuple(
    transformers(
        "JambaForCausalLM",
        "JambaConfig",
        _LM,
        note=f"{way} experts",
        **_LLAMA,
        num_experts=4,
        num_experts_per_tok=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=4,
        mamba_dt_rank=4,
        experts_implementation=way,
        experts=_experts(28),
        axes={"*.mamba.act": 1, "*": -1},
    )
    for way in _WAYS
)
