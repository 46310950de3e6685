"""A vision-language model of the real classes with random weights, small enough to be made in a test."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)


WORDS = ["a", "red", "blue", "small", "circle", "square", "moves", "slowly", "left", "over", "the", "sea", "."]
WORDS += ["</s>", "<s>", "<unk>", "<image>"]
LEAST_WORDS = 3  # in an answer
CHAT = (
    "{{ bos_token }}{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)
_SIZE, _PATCH = 28, 14


def make_tiny_vision_model(
    folder: Path, *, says_only: str | None = None, ends: bool = True, chat_template: str | None = CHAT
) -> Path:
    """Write a LLaVA of 0.03 M parameters, with processor and tokenizer.

    Args:
        says_only: the one word that its answers have; None: any of `WORDS`, in dependence on what it sees.
        ends: its answers end by themselves, if only at the longest that is allowed; otherwise never.
        chat_template: in Jinja.
    """
    torch.manual_seed(0)
    ids = {word: number for number, word in enumerate(WORDS)}
    said = [says_only] if says_only else [word for word in WORDS if word[0] != "<"]
    never_said = [number for word, number in ids.items() if word not in [*said, *(["</s>"] if ends else [])]]
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": _SIZE, "patch_size": _PATCH, "projection_dim": 16}
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"bos_token_id": ids["<s>"], "eos_token_id": ids["</s>"], "pad_token_id": ids["</s>"]}
    text |= {"vocab_size": len(WORDS), "num_key_value_heads": 2}
    text |= {"initializer_range": 0.5}  # so that the words depend on what is seen
    configs = {"vision_config": CLIPVisionConfig(**vision), "text_config": LlamaConfig(**text)}
    model = LlavaForConditionalGeneration(
        LlavaConfig(**configs, image_token_index=ids["<image>"], vision_feature_layer=-1)
    )
    model.generation_config.suppress_tokens = never_said
    model.generation_config.min_new_tokens = LEAST_WORDS
    model.generation_config.forced_eos_token_id = ids["</s>"] if ends else None
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel(ids, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", ids["<s>"])])
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    special |= {"extra_special_tokens": {"image_token": "<image>"}}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **special)
    size = {"height": _SIZE, "width": _SIZE}
    LlavaProcessor(
        CLIPImageProcessor(size=size, crop_size=size),
        tokenizer,
        patch_size=_PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which "default" drops again
        chat_template=chat_template,
    ).save_pretrained(folder)
    return folder
