"""Recognizes what is no plain DiT in a file: parts of another network, another kind of file, or weights already quantized.

A table of signs: what names (or kinds of objects in a pickle) look like, what they mean, and what to do about it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple


class _Sign(NamedTuple):
    """A pattern to search for in names, what a match means, and the remedy, if not to use another program."""

    pattern: str
    meaning: str
    remedy: str = ""


_REMEDY_QUANTIZED = "import the float weights that it was made from"
#: The network's weights in a form that cannot be read. Searched first, in this order.
_FORMS = (
    _Sign(
        r"\.lora_(A|B|E|down|up|embedding)\b|\.base_layer\.|\.lokr_|\.hada_w|\.modules_to_save\.",
        "adapters of a fine-tuning (LoRA) beside or without the weights that they change",
        "merge them first (in PEFT: model.merge_and_unload()) and save the merged model",
    ),
    _Sign(
        r"weight_quantizer\.|act_quantizer\.|weight_quant\.|\.org_weight|\.adaround\.",
        "weights quantized by PTQ4DiT's code",
        _REMEDY_QUANTIZED,
    ),
    _Sign(
        r"torchao\.|\.tensor_impl\.|\.original_weight_tensor|\.int_data\b|_weight_qdata|\.qdata\b",
        "weights quantized by torchao",
        _REMEDY_QUANTIZED,
    ),
    _Sign(
        r"quanto\.|\.weight\._data$|\.weight\._scale$|\.(input|output)_scale$", "weights quantized by quanto", _REMEDY_QUANTIZED
    ),
    _Sign(
        r"\.weight\.(absmax|quant_map|quant_state|nested_|bitsandbytes)|\.weight_format$|\.SCB$|bitsandbytes\.",
        "weights quantized by bitsandbytes",
        _REMEDY_QUANTIZED,
    ),
    _Sign(
        r"\.qweight$|\.qzeros$|\.g_idx$|\.wscales$|\.smooth_factor$",
        "weights quantized by GPTQ, AWQ or SVDQuant",
        _REMEDY_QUANTIZED,
    ),
    _Sign(r"\.(weight|kernel)_(scale|zero_point|zp)$|\.(qvalue|scale_inv)$", "weights quantized already", _REMEDY_QUANTIZED),
    _Sign(
        r"\.parametrizations\.|\.weight_(g|v)$",
        "weights under a parametrization (such as weight norm)",
        "remove it and save the plain weights",
    ),
    _Sign(
        r"(^|\.)_?flat_param(_|$|\.)", "weights flattened by FSDP", "save the full state dict (StateDictType.FULL_STATE_DICT)"
    ),
)
#: Files that are no transformer at all, recognized by names that only they have.
_FILES = (
    _Sign(
        r"(^|\.)text_model\.|(^|\.)token_embedding\.|(^|\.)embed_tokens\.|(^|\.)shared\.weight$|\.wte\.weight$",
        "a text encoder",
    ),
    _Sign(
        r"(^|\.)decoder\.(conv_in|up_blocks|up\.\d|mid_block)|(^|\.)(post_)?quant_conv\.",
        "a VAE",
        "pass the transformer here, and the VAE with --vae to sample",
    ),
    _Sign(r"(^|\.)(down_blocks|up_blocks|input_blocks|output_blocks|middle_block)\.", "a U-Net"),
    _Sign(
        r"(^|\.)(double_blocks|single_blocks|joint_blocks|single_transformer_blocks)\.",
        "a transformer of two streams (MMDiT, such as SD 3 or Flux)",
    ),
    _Sign(r"(^|\.)(vision_model|visual|patch_embeddings|cls_token)\b", "an image encoder"),
    _Sign(
        r"(^|\.)(exp_avg|exp_avg_sq|param_groups|opt_state|momentum_buffer)(\.|$)",
        "the state of an optimizer",
        "pass the file with the weights",
    ),
)
#: Parts that a DiT lacks.
_PARTS = (
    _Sign(r"(q_norm|k_norm|norm_q|norm_k|query_norm|key_norm|qk_norm|q_rms|k_rms|ln_q|ln_k)\b", "norms of queries and keys"),
    _Sign(r"(^|\.)w12\.|\.w[123]\.|gate_proj|up_proj|\.swiglu|\.ffn\.w|\.glu\.", "SwiGLU"),
    _Sign(r"rope|freqs_(cis|cos|sin)|inv_freq|rotary", "rotary positions"),
    _Sign(
        r"(\b|_)(norm\d*|norm_final|pre_norm|post_norm|input_layernorm|rms_?norm\w*|layer_?norm\w*|ln_?\d*)(_\d+)?\.(weight|bias|scale|gamma|g)$",
        "norms with learned gains (RMSNorm, or LayerNorm with affine parameters)",
    ),
    _Sign(r"cross_attn|crossattn|attn2\b|caption|context|text_|txt_|\by_proj|cap_embedder", "conditioning on text"),
    _Sign(r"skip_(linear|proj)|\.skip\.", "long skip connections (U-ViT)"),
    _Sign(r"experts?\.|\.router|\.gate\.weight", "a mixture of experts"),
    _Sign(r"(r|h|s|step|dt|duration)_embedder\.|delta_embedder", "a second embedder of time"),
    _Sign(r"scale_shift_table|t_block\.|adaln_single|adaLN_single", "a modulation shared by all blocks (PixArt)"),
    _Sign(r"layer_?scale|\.ls\d\.|\bgamma_\d", "layer scales"),
    _Sign(r"mask_token|decoder_pos_embed|sideblocks", "parts of a masked training (MaskDiT, MDT)"),
    _Sign(r"dwconv|depthwise|conv\d?\.weight$", "convolutions"),
    _Sign(r"register_tokens?|cls_tok|class_tokens?", "tokens besides those of the image"),
)


def form_of(names: Iterable[str]) -> str:
    """Returns a clause on a form of weights that cannot be read, with the remedy, or nothing."""
    return next((f"it holds {sign.meaning}: {sign.remedy}" for sign in _matches(_FORMS, names)), "")


def file_of(names: Iterable[str]) -> str:
    """Returns a clause on what a file without a known layout seems to be, or nothing."""
    sign = next(iter(_matches(_FILES, names)), None)
    return "" if sign is None else f"it seems to be {sign.meaning}" + (f": {sign.remedy}" if sign.remedy else "")


def parts_of_another(names: Iterable[str]) -> list[str]:
    """Describes, for names that a DiT does not have, the parts of another network."""
    return [sign.meaning for sign in _matches(_PARTS, names)]


def _matches(signs: tuple[_Sign, ...], names: Iterable[str]) -> list[_Sign]:
    names = list(names)
    return [sign for sign in signs if any(re.search(sign.pattern, name) for name in names)]
