"""Captioners and a chat model of a few hundred kB with random weights.

They are laid out as BLIP-2, Qwen3-VL and Qwen2.5 are on the hub. Kinds for `tiny.checkpoint`: "blip2",
"qwen3-vl", "chat"."""
import json

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tiny import DIM, MEAN, STD, edit_json, makes

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
        "<|video_pad|>"]
TURN = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' if c.type == 'image' else c.text }}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")

def byte_tokenizer(folder, kind:str, before=(), after=(), **config) -> dict:
    """A byte-level BPE tokenizer without merges in all files of the real ones. Returns {token: id}.

    `before` and `after` are the special tokens around the 256 bytes."""
    ids = {token: i for i, token in enumerate([*before, *BYTES])}
    tok = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = (*before, *after)
    tok.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tok.save(str(folder/"tokenizer.json"))
    (folder/"vocab.json").write_text(json.dumps(ids))
    (folder/"merges.txt").write_text("#version: 0.2\n")
    as_it_is = dict(special=True, normalized=False, lstrip=False, rstrip=False, single_word=False)
    added = {str(tok.token_to_id(token)): dict(content=token, **as_it_is) for token in special}
    edit_json(folder/"tokenizer_config.json", tokenizer_class=kind, model_max_length=4096,
              clean_up_tokenization_spaces=False, **config, added_tokens_decoder=added)
    return tok.get_vocab()

def loud(model, scale:float=8.):
    "Larger random weights, so that what is said depends on what is seen."
    for p in model.parameters():
        if p.dim() > 1:
            p.data.normal_(0, scale*p.shape[-1]**-.5/4)
    return model

NARROW = dict(hidden_size=DIM, num_hidden_layers=2, num_attention_heads=2)

@makes("blip2")
def blip2(folder):
    "A ViT, a Q-Former with 4 queries and OPT, which ends its captions with a new line."
    from transformers import Blip2Config, Blip2ForConditionalGeneration
    ids = byte_tokenizer(folder, "GPT2Tokenizer", ["<s>", "<pad>", "</s>"], ["<image>"], add_bos_token=True,
                         bos_token="</s>", eos_token="</s>", pad_token="<pad>", unk_token="</s>",
                         processor_class="Blip2Processor")
    vision = dict(**NARROW, intermediate_size=2*DIM, image_size=28, patch_size=14)
    qformer = dict(**NARROW, intermediate_size=2*DIM, encoder_hidden_size=DIM, vocab_size=99)
    text = dict(model_type="opt", **NARROW, ffn_dim=2*DIM, word_embed_proj_dim=DIM, vocab_size=264,
                max_position_embeddings=128, bos_token_id=2, pad_token_id=1, eos_token_id=ids["Ċ"])
    config = Blip2Config(vision_config=vision, qformer_config=qformer, text_config=text, num_query_tokens=4,
                         image_token_index=ids["<image>"])
    model = loud(Blip2ForConditionalGeneration(config))
    model.query_tokens.data.normal_()
    model.save_pretrained(folder)
    edit_json(folder/"processor_config.json", num_query_tokens=4, processor_class="Blip2Processor")
    edit_json(folder/"preprocessor_config.json", do_convert_rgb=True, do_normalize=True, do_rescale=True,
              do_resize=True, image_mean=MEAN, image_std=STD, image_processor_type="BlipImageProcessor",
              processor_class="Blip2Processor", resample=3, rescale_factor=1/255,
              size=dict(height=28, width=28))

def _turns(folder, processor=None):
    "Qwen's tokenizer; the template of a chat comes with it or with the `processor`."
    own = {"processor_class": processor} if processor else {"chat_template": TURN}
    return byte_tokenizer(folder, "Qwen2Tokenizer", [], QWEN, eos_token="<|im_end|>",
                          pad_token="<|endoftext|>", unk_token=None, bos_token=None, **own)

def _sampling(folder, ids):
    "Both of Qwen's models come with settings for random answers."
    end, pad = ids["<|im_end|>"], ids["<|endoftext|>"]
    edit_json(folder/"generation_config.json", do_sample=True, temperature=.7, top_p=.8, top_k=20,
              eos_token_id=[end, pad], pad_token_id=pad)

@makes("qwen3-vl")
def qwen3_vl(folder):
    """A vision tower whose layers feed several layers of the text model.

    Images have as many tokens as their size asks for."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
    ids = _turns(folder, "Qwen3VLProcessor")
    rope = dict(rope_type="default", mrope_section=[4, 2, 2], mrope_interleaved=True)
    text = dict(**NARROW, intermediate_size=2*DIM, vocab_size=264, num_key_value_heads=1, head_dim=16,
                max_position_embeddings=4096, rope_theta=5e6, rope_scaling=rope)
    vision = dict(depth=2, hidden_size=DIM, intermediate_size=2*DIM, num_heads=2, out_hidden_size=DIM,
                  patch_size=16, num_position_embeddings=16, deepstack_visual_indexes=[0, 1])
    config = Qwen3VLConfig(
        text_config=text, vision_config=vision, image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"], vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"])
    loud(Qwen3VLForConditionalGeneration(config)).save_pretrained(folder)
    _sampling(folder, ids)
    pixels = dict(processor_class="Qwen3VLProcessor", patch_size=16, temporal_patch_size=2, merge_size=2,
                  image_mean=[.5]*3, image_std=[.5]*3, size=dict(shortest_edge=32*32, longest_edge=64*96))
    edit_json(folder/"preprocessor_config.json", image_processor_type="Qwen2VLImageProcessorFast", **pixels)
    edit_json(folder/"video_preprocessor_config.json", video_processor_type="Qwen3VLVideoProcessor", **pixels)
    edit_json(folder/"chat_template.json", chat_template=TURN)

@makes("chat")
def chat(folder):
    "Qwen2.5, text only."
    from transformers import Qwen2Config, Qwen2ForCausalLM
    ids = _turns(folder)
    config = Qwen2Config(**NARROW, intermediate_size=2*DIM, vocab_size=264, num_key_value_heads=1,
                         max_position_embeddings=4096, eos_token_id=ids["<|im_end|>"],
                         pad_token_id=ids["<|endoftext|>"])
    loud(Qwen2ForCausalLM(config)).save_pretrained(folder)
    _sampling(folder, ids)
