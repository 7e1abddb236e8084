"""A hundred architectures of timm, torchvision and transformers, with seeded weights, and data that fits them.

Nothing is downloaded. Weights are drawn as each library draws them, under a seed; transformers' are drawn with the standard
deviation 1/sqrt(width), as at .02 a narrow network computes next to nothing. Batch norms then have the statistics of pictures
that scikit-image ships. What these networks compute means nothing; their operators, shapes and kernels are the published ones.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import skimage
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

import exporter

for _operator in (
    "nms",
    "qnms",
):  # torchvision beside a CPU build of torch lacks its own library, and asks for these by name
    torch.library.define(f"torchvision::{_operator}", "(Tensor a, Tensor b, float c) -> Tensor")

import timm  # noqa: E402  # it imports torchvision
import torchvision  # noqa: E402
import transformers  # noqa: E402

Batch = dict[str, NDArray[np.generic]]
Kwargs = Mapping[str, Any]

CALIBRATION, HELDOUT = 8, 6
# As in samples/lite0: held out are pictures that calibration never sees
PICTURES = (
    ("astronaut.png", "motorcycle_left.png", "coins.png", "grass.png", "gravel.png", "brick.png", "retina.jpg", "ihc.png",
     "hubble_deep_field.jpg", "page.png"),
    ("chelsea.png", "coffee.png", "rocket.jpg", "camera.png"),
)  # fmt: skip
MEAN, STD = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)
TINY_SCALE = 1e-4
WORDS, TOKENS, SHORTEST = 1000, 48, 24  # transformers' vocabulary, a text's tokens, and those of the shortest one
WIDTH, HEADS, LAYERS = 192, 4, 3
SAMPLES = 8000  # of sound: half a second
MELS, FRAMES = 80, 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One network: how it is made and what it reads. key: `library/name`."""

    key: str
    build: Callable[[], nn.Module]
    batches: Callable[[int], list[Batch]]


# --- pictures -------------------------------------------------------------------------------------------------------------


def _views(side: int, heldout: int) -> list[Batch]:
    """float32 [1, 3, side, side], ImageNet's normalisation: crops of 35 to 100 % of a picture's shorter side, half mirrored."""
    rng, made = np.random.default_rng(heldout), list[Batch]()
    names, count = PICTURES[heldout], (CALIBRATION, HELDOUT)[heldout]
    for number in range(count):
        with Image.open(Path(skimage.__file__).parent / "data" / names[number % len(names)]) as opened:
            picture = opened.convert("RGB")
        extent = int(min(picture.size) * rng.uniform(0.35, 1.0))
        left, top = (int(rng.integers(0, size - extent + 1)) for size in picture.size)
        view = picture.resize((side, side), Image.Resampling.BICUBIC, box=(left, top, left + extent, top + extent))
        pixels = np.asarray(view, np.float32) / 255
        pixels = pixels[:, ::-1] if rng.random() < 0.5 else pixels
        made.append({"image": np.ascontiguousarray(((pixels - MEAN) / STD).transpose(2, 0, 1)[None])})
    return made


def _settled(module: nn.Module, batches: Sequence[Batch]) -> nn.Module:
    """Batch norms have the mean and variance of the batches' data, all else is in eval mode.

    Matrices that start as zeros, as some heads do, are drawn, and layer scales that start near zero are 1: without that the
    outputs would not depend on the picture.
    """
    module.eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 2 and not parameter.any():
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
            if parameter.numel() > 1 and 0 < parameter.abs().max() <= TINY_SCALE:
                nn.init.ones_(parameter)
    norms = [each for each in module.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = None  # the plain average over what follows
        norm.reset_running_stats()
        norm.train()
    if norms:
        stacked = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
        with torch.no_grad():
            module(*(torch.from_numpy(value) for value in stacked.values()))
    return module.eval()


# name: side of the picture. Those that must be told the side when they are made are in SIZED.
TIMM = {
    "lcnet_050": 128, "regnety_002": 224, "mobilenetv3_small_100": 128, "efficientvit_m0": 224, "edgenext_xx_small": 128,
    "mobilevit_xxs": 128, "ghostnet_050": 128, "mnasnet_small": 128, "tinynet_e": 128, "mobilenetv2_050": 128,
    "mobilenetv4_conv_small": 128, "regnetx_002": 128, "starnet_s1": 128, "convnext_atto": 128, "convnextv2_atto": 128,
    "vit_tiny_patch16_224": 128, "xcit_nano_12_p16_224": 128, "pvt_v2_b0": 128, "repvit_m0_9": 128, "fastvit_t8": 128,
    "semnasnet_075": 128, "mixnet_s": 128, "rexnet_100": 96, "efficientnet_b0": 96, "efficientnet_lite0": 128,
    "tf_efficientnetv2_b0": 96, "hardcorenas_a": 96, "mobilevitv2_050": 128, "efficientvit_b0": 128, "shvit_s1": 128,
    "hgnetv2_b0": 128, "fbnetc_100": 96, "ghostnetv2_100": 96, "mobileone_s0": 96, "levit_128s": 224, "convit_tiny": 96,
    "coat_lite_tiny": 96, "efficientformerv2_s0": 224, "mambaout_femto": 96, "eva02_tiny_patch14_224": 112,
    "gmlp_ti16_224": 224, "pit_ti_224": 224, "crossvit_tiny_240": 240, "ese_vovnet19b_dw": 96, "resnet18": 96,
    "seresnet18": 64, "skresnet18": 64, "resnext26ts": 96, "resnest14d": 64, "densenet121": 64, "dpn48b": 64, "repvgg_a0": 64,
    "gernet_s": 96, "regnetz_b16": 64, "poolformer_s12": 96, "visformer_tiny": 224, "cait_xxs24_224": 64, "hrnet_w18_small": 64,
    "nf_resnet26": 64, "resnet26d": 64, "ecaresnet26t": 64, "dla34": 64, "botnet26t_256": 256, "lambda_resnet26t": 256,
    "halonet26t": 256, "tiny_vit_5m_224": 224, "gcvit_xxtiny": 224, "nest_tiny": 224, "maxvit_rmlp_pico_rw_256": 256,
    "resmlp_12_224": 224, "mixer_s32_224": 224, "twins_svt_small": 64, "convmixer_768_32": 64, "res2net50_14w_8s": 64,
    "swin_tiny_patch4_window7_224": 224, "sequencer2d_s": 224, "inception_v3": 139,
}  # fmt: skip
SIZED = frozenset({
    "vit_tiny_patch16_224", "cait_xxs24_224", "xcit_nano_12_p16_224", "coat_lite_tiny", "convit_tiny", "eva02_tiny_patch14_224",
})  # fmt: skip
TORCHVISION = {
    "shufflenet_v2_x0_5": 128, "squeezenet1_1": 128, "mobilenet_v3_small": 128, "mnasnet0_5": 128, "mobilenet_v2": 128,
    "regnet_y_400mf": 128, "lraspp_mobilenet_v3_large": 96, "deeplabv3_mobilenet_v3_large": 96, "googlenet": 64, "alexnet": 64,
    }  # fmt: skip
TOLD = {"googlenet": {"init_weights": True, "aux_logits": False}}
SEGMENTERS = ("lraspp_", "deeplabv3_")


class Segments(nn.Module):
    """A segmentation network of torchvision, image -> scores of each pixel."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        out: Tensor = self.model(image)["out"]
        return out


def _timm(name: str, side: int) -> nn.Module:
    return timm.create_model(name, pretrained=False, **({"img_size": side} if name in SIZED else {}))  # type: ignore[no-any-return]


def _torchvision(name: str) -> nn.Module:
    if name.startswith(SEGMENTERS):
        return Segments(torchvision.models.get_model(name, weights=None, weights_backbone=None))
    return torchvision.models.get_model(name, weights=None, **TOLD.get(name, {}))  # type: ignore[no-any-return]


# --- transformers ---------------------------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """A model of transformers -> its logits, or its last hidden states where it has none."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def picked(self, **given: Tensor) -> Tensor:
        found = self.model(**given)
        for field in ("logits", "logits_per_image", "predicted_depth", "last_hidden_state"):
            if (value := getattr(found, field, None)) is not None:
                chosen: Tensor = value
                return chosen
        raise TypeError(f"{type(self.model).__name__}: {type(found).__name__} has neither logits nor states")


class Text(Wrapped):
    """Tokens and a mask."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.picked(input_ids=input_ids, attention_mask=attention_mask)


class Tokens(Wrapped):
    """Tokens that are all to be read, without a cache of keys and values."""

    def forward(self, input_ids: Tensor) -> Tensor:
        extra: dict[str, Any] = {"use_cache": False} if hasattr(self.model.config, "use_cache") else {}
        return self.picked(input_ids=input_ids, **extra)


class Pair(Wrapped):
    """An encoder's tokens and a decoder's."""

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor) -> Tensor:
        extra: dict[str, Any] = {"use_cache": False}
        return self.picked(input_ids=input_ids, decoder_input_ids=decoder_input_ids, **extra)


class Picture(Wrapped):
    """A picture."""

    def forward(self, image: Tensor) -> Tensor:
        return self.picked(pixel_values=image)


class Sound(Wrapped):
    """Half a second of samples."""

    def forward(self, input_values: Tensor) -> Tensor:
        return self.picked(input_values=input_values)


class Mel(Wrapped):
    """A spectrogram."""

    def forward(self, input_features: Tensor) -> Tensor:
        return self.picked(input_features=input_features)


class Clip(Wrapped):
    """Tokens and a picture."""

    def forward(self, input_ids: Tensor, image: Tensor) -> Tensor:
        return self.picked(input_ids=input_ids, pixel_values=image)


def _tokens(heldout: int, *names: str) -> list[Batch]:
    """int64 [1, 48]: few words are frequent, most are rare. attention_mask: 24 to 48 of them are a text, the rest is padding."""
    rng, made = np.random.default_rng(100 + heldout), list[Batch]()
    for _ in range((CALIBRATION, HELDOUT)[heldout]):
        batch = Batch()
        for name in names:
            if name == "attention_mask":
                batch[name] = (np.arange(TOKENS) < rng.integers(SHORTEST, TOKENS + 1)).astype(np.int64)[None]
            else:
                batch[name] = (rng.zipf(1.3, (1, TOKENS)) % (WORDS - 10) + 5).astype(np.int64)
        made.append(batch)
    return made


def _sound(heldout: int, name: str, shape: tuple[int, ...]) -> list[Batch]:
    """float32: a few tones that swell and fade, and noise, normalised; of each mel band where there are bands."""
    rng, made = np.random.default_rng(200 + heldout), list[Batch]()
    time = np.linspace(0, 1, shape[-1])
    for _ in range((CALIBRATION, HELDOUT)[heldout]):
        tones = [
            rng.uniform(0.2, 1) * np.sin(2 * np.pi * (rng.uniform(5, shape[-1] / 8) * time + rng.random()))
            for _ in range(5)
        ]
        wave = sum(tones) * np.sin(np.pi * time) + 0.05 * rng.normal(size=shape)
        made.append({name: ((wave - wave.mean()) / wave.std()).astype(np.float32)})
    return made


def _clip(side: int, heldout: int) -> list[Batch]:
    pairs = zip(_tokens(heldout, "input_ids"), _views(side, heldout), strict=True)
    return [{**text, **picture} for text, picture in pairs]


_ENCODER: Kwargs = {
    "vocab_size": WORDS, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "intermediate_size": 4 * WIDTH, "max_position_embeddings": 128,
}  # fmt: skip
_DECODER: Kwargs = {**_ENCODER, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_VIT: Kwargs = {
    "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 4 * WIDTH,
    "image_size": 96, "patch_size": 16,
}  # fmt: skip
_SPEECH: Kwargs = {
    "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS, "intermediate_size": 4 * WIDTH, "vocab_size": 32,
    "conv_dim": (64,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
}  # fmt: skip
_GPT: Kwargs = {"vocab_size": WORDS, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 128}
_PAIRED: Kwargs = {
    "vocab_size": WORDS, "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS, "encoder_ffn_dim": 4 * WIDTH, "decoder_ffn_dim": 4 * WIDTH, "max_position_embeddings": 128,
    "pad_token_id": 1, "decoder_start_token_id": 2,
}  # fmt: skip
_T5: Kwargs = {
    "vocab_size": WORDS, "d_model": WIDTH, "d_kv": WIDTH // HEADS, "d_ff": 4 * WIDTH, "num_layers": 2, "num_heads": HEADS,
    "decoder_start_token_id": 0,
}  # fmt: skip

# name: (wrapper, configuration's class, model's class, configuration). A wrapper says what the network reads.
TRANSFORMERS: dict[str, tuple[type[Wrapped], str, str, Kwargs]] = {
    "bert": (Text, "BertConfig", "BertForSequenceClassification", _ENCODER),
    "roberta": (Text, "RobertaConfig", "RobertaForTokenClassification", _ENCODER),
    "distilbert": (Text, "DistilBertConfig", "DistilBertModel", {
        "vocab_size": WORDS, "dim": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": 4 * WIDTH}),
    "albert": (Text, "AlbertConfig", "AlbertModel", {**_ENCODER, "embedding_size": 64}),
    "electra": (Text, "ElectraConfig", "ElectraModel", {**_ENCODER, "embedding_size": 64}),
    "deberta": (Text, "DebertaConfig", "DebertaModel", {**_ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    "deberta-v2": (Text, "DebertaV2Config", "DebertaV2Model", {
        **_ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    "mobilebert": (Text, "MobileBertConfig", "MobileBertModel", {
        **_ENCODER, "intra_bottleneck_size": 64, "embedding_size": 64, "intermediate_size": 256}),
    "squeezebert": (Text, "SqueezeBertConfig", "SqueezeBertModel", {**_ENCODER, "embedding_size": WIDTH}),
    "mpnet": (Text, "MPNetConfig", "MPNetModel", _ENCODER),
    "esm": (Text, "EsmConfig", "EsmModel", {**_ENCODER, "position_embedding_type": "rotary", "pad_token_id": 1}),
    "convbert": (Text, "ConvBertConfig", "ConvBertModel", {**_ENCODER, "embedding_size": WIDTH}),
    "roformer": (Text, "RoFormerConfig", "RoFormerModel", {**_ENCODER, "embedding_size": WIDTH}),
    "modernbert": (Text, "ModernBertConfig", "ModernBertModel", {
        **_ENCODER, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}),
    "funnel": (Text, "FunnelConfig", "FunnelBaseModel", {
        "vocab_size": WORDS, "d_model": WIDTH, "n_head": HEADS, "d_head": WIDTH // HEADS, "d_inner": 4 * WIDTH,
        "block_sizes": [1, 1]}),
    "xlnet": (Text, "XLNetConfig", "XLNetModel", {
        "vocab_size": WORDS, "d_model": WIDTH, "n_layer": 2, "n_head": HEADS, "d_inner": 4 * WIDTH}),
    "gpt2": (Tokens, "GPT2Config", "GPT2LMHeadModel", _GPT),
    "gpt-neo": (Tokens, "GPTNeoConfig", "GPTNeoForCausalLM", {
        "vocab_size": WORDS, "hidden_size": WIDTH, "num_layers": 2, "num_heads": HEADS,
        "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 128, "window_size": 32}),
    "gpt-neox": (Tokens, "GPTNeoXConfig", "GPTNeoXForCausalLM", _ENCODER),
    "opt": (Tokens, "OPTConfig", "OPTForCausalLM", {
        "vocab_size": WORDS, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "ffn_dim": 4 * WIDTH,
        "max_position_embeddings": 128, "word_embed_proj_dim": WIDTH}),
    "bloom": (Tokens, "BloomConfig", "BloomForCausalLM", {
        "vocab_size": WORDS, "hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS}),
    "llama": (Tokens, "LlamaConfig", "LlamaForCausalLM", _DECODER),
    "mistral": (Tokens, "MistralConfig", "MistralForCausalLM", {**_DECODER, "sliding_window": 32}),
    "qwen2": (Tokens, "Qwen2Config", "Qwen2ForCausalLM", _DECODER),
    "qwen3": (Tokens, "Qwen3Config", "Qwen3ForCausalLM", {**_DECODER, "head_dim": WIDTH // HEADS}),
    "gemma": (Tokens, "GemmaConfig", "GemmaForCausalLM", {**_DECODER, "head_dim": WIDTH // HEADS}),
    "phi": (Tokens, "PhiConfig", "PhiForCausalLM", _DECODER),
    "falcon": (Tokens, "FalconConfig", "FalconForCausalLM", {
        "vocab_size": WORDS, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}),
    "codegen": (Tokens, "CodeGenConfig", "CodeGenForCausalLM", {**_GPT, "n_ctx": 128, "rotary_dim": 16}),
    "t5": (Pair, "T5Config", "T5ForConditionalGeneration", _T5),
    "bart": (Pair, "BartConfig", "BartForConditionalGeneration", _PAIRED),
    "marian": (Pair, "MarianConfig", "MarianMTModel", _PAIRED),
    "pegasus": (Pair, "PegasusConfig", "PegasusForConditionalGeneration", _PAIRED),
    "vit": (Picture, "ViTConfig", "ViTForImageClassification", _VIT),
    "deit": (Picture, "DeiTConfig", "DeiTForImageClassification", _VIT),
    "beit": (Picture, "BeitConfig", "BeitForImageClassification", {**_VIT, "use_relative_position_bias": True}),
    "dinov2": (Picture, "Dinov2Config", "Dinov2Model", _VIT),
    "yolos": (Picture, "YolosConfig", "YolosForObjectDetection", {**_VIT, "image_size": [96, 96], "num_detection_tokens": 20}),
    "swin": (Picture, "SwinConfig", "SwinForImageClassification", {
        "image_size": 112, "embed_dim": 48, "depths": [1, 2], "num_heads": [2, 4], "window_size": 7}),
    "swinv2": (Picture, "Swinv2Config", "Swinv2ForImageClassification", {
        "image_size": 112, "embed_dim": 48, "depths": [1, 2], "num_heads": [2, 4], "window_size": 7}),
    "convnext": (Picture, "ConvNextConfig", "ConvNextForImageClassification", {
        "hidden_sizes": [48, 96, 192], "depths": [1, 1, 2], "num_stages": 3}),
    "segformer": (Picture, "SegformerConfig", "SegformerForSemanticSegmentation", {
        "hidden_sizes": [32, 64, 96, 128], "depths": [1, 1, 1, 1], "decoder_hidden_size": 64,
        "num_attention_heads": [1, 2, 4, 8]}),
    "mobilevit": (Picture, "MobileViTConfig", "MobileViTForImageClassification", {
        "image_size": 128, "hidden_sizes": [48, 64, 80], "neck_hidden_sizes": [16, 16, 24, 48, 64, 80, 160]}),
    "poolformer": (Picture, "PoolFormerConfig", "PoolFormerForImageClassification", {
        "hidden_sizes": [32, 64, 96, 128], "depths": [1, 1, 1, 1]}),
    "levit": (Picture, "LevitConfig", "LevitForImageClassification", {
        "image_size": 128, "hidden_sizes": [64, 96, 128], "depths": [1, 1, 1], "num_attention_heads": [2, 3, 4]}),
    "dpt": (Picture, "DPTConfig", "DPTForDepthEstimation", {
        **_VIT, "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [32, 48, 64, 64],
        "fusion_hidden_size": 32}),
    "clip": (Clip, "CLIPConfig", "CLIPModel", {
        "text_config": {**_ENCODER, "projection_dim": 64, "eos_token_id": 2}, "vision_config": {**_VIT, "projection_dim": 64},
        "projection_dim": 64}),
    "wav2vec2": (Sound, "Wav2Vec2Config", "Wav2Vec2ForCTC", _SPEECH),
    "hubert": (Sound, "HubertConfig", "HubertModel", _SPEECH),
    "wavlm": (Sound, "WavLMConfig", "WavLMModel", _SPEECH),
    "sew": (Sound, "SEWConfig", "SEWModel", {**_SPEECH, "conv_dim": (64,) * 13, "squeeze_factor": 2}),
    "ast": (Sound, "ASTConfig", "ASTForAudioClassification", {
        "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 4 * WIDTH,
        "max_length": FRAMES, "num_mel_bins": MELS}),
    "whisper": (Mel, "WhisperConfig", "WhisperEncoder", {
        **{key: value for key, value in _PAIRED.items() if key != "max_position_embeddings"}, "num_mel_bins": MELS,
        "max_source_positions": FRAMES // 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}),
}  # fmt: skip


def _transformers(wrapper: type[Wrapped], config: str, model: str, kwargs: Kwargs) -> nn.Module:
    kind = getattr(transformers, config)
    made = kind(**kwargs)
    width = getattr(made, "hidden_size", None) or getattr(made, "d_model", WIDTH)
    for name in ("initializer_range", "init_std"):
        if hasattr(made, name) and isinstance(width, int):
            setattr(made, name, width**-0.5)
    if model == "WhisperEncoder":  # it has no public name
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        return wrapper(WhisperEncoder(made))
    return wrapper(getattr(transformers, model)(made))


def _reads(wrapper: type[Wrapped], kwargs: Kwargs) -> Callable[[int], list[Batch]]:
    names = list(inspect.signature(wrapper.forward).parameters)[1:]
    side = kwargs.get("image_size", kwargs.get("vision_config", {}).get("image_size", 96))
    side = side[0] if isinstance(side, list) else side
    if wrapper is Clip:
        return lambda heldout: _clip(side, heldout)
    if wrapper is Picture:
        return lambda heldout: _views(side, heldout)
    if wrapper is Sound:
        shape = (1, FRAMES, MELS) if "num_mel_bins" in kwargs else (1, SAMPLES)
        return lambda heldout: _sound(heldout, "input_values", shape)
    if wrapper is Mel:
        return lambda heldout: _sound(heldout, "input_features", (1, MELS, FRAMES))
    return lambda heldout: _tokens(heldout, *names)


# --- all ------------------------------------------------------------------------------------------------------------------


def architectures() -> list[Architecture]:
    """All of them, the three libraries one after the other."""
    found = []
    for name, side in TIMM.items():
        found.append(
            Architecture(
                key=f"timm/{name}",
                build=lambda name=name, side=side: _timm(name, side),  # type: ignore[misc]
                batches=lambda heldout, side=side: _views(side, heldout),  # type: ignore[misc]
            )
        )
    for name, side in TORCHVISION.items():
        found.append(
            Architecture(
                key=f"torchvision/{name}",
                build=lambda name=name: _torchvision(name),  # type: ignore[misc]
                batches=lambda heldout, side=side: _views(side, heldout),  # type: ignore[misc]
            )
        )
    for name, asked in TRANSFORMERS.items():
        found.append(
            Architecture(
                key=f"transformers/{name}",
                build=lambda asked=asked: _transformers(*asked),  # type: ignore[misc]
                batches=_reads(asked[0], asked[3]),
            )
        )
    return found


def source(architecture: Architecture) -> exporter.Source:
    """The network in eval mode, called with one example of fixed shape."""
    calibration = architecture.batches(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = _settled(architecture.build(), calibration)
    return exporter.from_module(module, inputs=calibration[0], outputs=["output"], name=architecture.key)
