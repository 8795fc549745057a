"""A checkpoint of Stable Diffusion 3.5-medium with random weights, laid out as the real one is.

It has the same files, classes, names of weights and oddities, and is only smaller. `sd35(folder)` writes it
and returns its folder; `t5=False` leaves out the third text encoder, as people do who are short of memory."""
import json, shutil, tempfile
from pathlib import Path

from diffda.places import nano_world
from diffda.models import quiet
from diffda.torch_core import seeded
from tiny import edit_json

# pixels of an image; width of the joint attention, more than both CLIPs together
SIDE, JOINT = 32, 48
# of the two CLIP encoders, and of what they project to
WIDTHS = (16, 24)
TOKENIZER = nano_world("generator", "tokenizer")

def clip_tokenizer(folder, pad):
    "CLIP's tokenizer for 77 tokens, padded with `pad`."
    from transformers import CLIPTokenizer
    shutil.copytree(TOKENIZER, folder)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        edit_json(folder/name, pad_token=pad)
    edit_json(folder/"tokenizer_config.json", model_max_length=77)
    return CLIPTokenizer.from_pretrained(folder)

def clip_encoder(words:int, width:int, activation:str):
    "Its config names 2 as the end of a text, which it is not: so do the real ones."
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection
    config = CLIPTextConfig(
        vocab_size=words, hidden_size=width, intermediate_size=2*width, num_hidden_layers=3,
        num_attention_heads=2, max_position_embeddings=77, projection_dim=width, hidden_act=activation,
        bos_token_id=0, eos_token_id=2, pad_token_id=1, initializer_factor=5.)
    return CLIPTextModelWithProjection(config)

def t5_tokenizer(folder):
    "Pieces of one character, and a few words."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import T5TokenizerFast
    words = [(f"▁{word}", -3.) for word in ("a", "photo", "of", "the", "good", "dark")]
    letters = [(chr(k), -5.) for k in range(33, 127)]
    pieces = [("<pad>", 0.), ("</s>", 0.), ("<unk>", 0.), ("▁", -2.), *words, *letters]
    tok = Tokenizer(models.Unigram(pieces, unk_id=2))
    blanks = dict(replacement="▁", prepend_scheme="always")
    split = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**blanks)]
    tok.pre_tokenizer = pre_tokenizers.Sequence(split)
    tok.decoder = decoders.Metaspace(**blanks)
    tok.post_processor = processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>",
                                                       special_tokens=[("</s>", 1)])
    folder.mkdir()
    tok.save(str(folder/"tokenizer.json"))
    edit_json(folder/"tokenizer_config.json", tokenizer_class="T5Tokenizer", eos_token="</s>",
              unk_token="<unk>", pad_token="<pad>", extra_ids=0, model_max_length=512)
    return T5TokenizerFast.from_pretrained(folder), len(pieces)

def t5_encoder(pieces:int):
    "T5's encoder for so many `pieces`, as wide as the joint attention."
    from transformers import T5Config, T5EncoderModel
    config = T5Config(vocab_size=pieces, d_model=JOINT, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
                      feed_forward_proj="gated-gelu")
    return T5EncoderModel(config)

def autoencoder():
    "With 16 channels of latents, which have a shift, and without convolutions beside them."
    from diffusers import AutoencoderKL
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"]*4, up_block_types=["UpDecoderBlock2D"]*4,
        block_out_channels=[8]*4, layers_per_block=1, latent_channels=16, norm_num_groups=4, sample_size=SIDE,
        scaling_factor=1.5305, shift_factor=.0609, use_quant_conv=False, use_post_quant_conv=False)

def transformer():
    "Two layers, the first with the second attention that the medium model has."
    from diffusers import SD3Transformer2DModel
    return SD3Transformer2DModel(
        sample_size=SIDE//8, patch_size=2, in_channels=16, out_channels=16, num_layers=2,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=JOINT, caption_projection_dim=32,
        pooled_projection_dim=sum(WIDTHS), pos_embed_max_size=8, dual_attention_layers=(0,),
        qk_norm="rms_norm")

def edit_index(folder, t5:bool):
    "Make `model_index.json` what it is on the hub."
    index = json.loads((folder/"model_index.json").read_text())
    for name in ("image_encoder", "feature_extractor"):
        del index[name]
    if t5:
        index["tokenizer_3"] = ["transformers", "T5TokenizerFast"]
    (folder/"model_index.json").write_text(json.dumps(index, indent=2))

def sd35(folder, t5:bool=True) -> Path:
    "Write the checkpoint into `folder`, the same weights each time."
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
    folder = Path(folder)
    with quiet(), seeded("tiny", "sd35"), tempfile.TemporaryDirectory() as temp:
        temp = Path(temp)
        one, two = clip_tokenizer(temp/"tokenizer", "<|endoftext|>"), clip_tokenizer(temp/"tokenizer_2", "!")
        three, pieces = t5_tokenizer(temp/"tokenizer_3")
        first, second = (clip_encoder(len(one), w, act) for w, act in zip(WIDTHS, ("quick_gelu", "gelu")))
        third, vae, net = t5_encoder(pieces), autoencoder(), transformer()
        pipe = StableDiffusion3Pipeline(
            transformer=net, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.), vae=vae, text_encoder=first,
            tokenizer=one, text_encoder_2=second, tokenizer_2=two, text_encoder_3=third if t5 else None,
            tokenizer_3=three if t5 else None)
        pipe.save_pretrained(folder)
        for name in ("tokenizer", "tokenizer_2"):
            shutil.rmtree(folder/name)
            shutil.copytree(temp/name, folder/name)
    edit_index(folder, t5)
    return folder
