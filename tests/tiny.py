"""Checkpoints of a few hundred kB with random weights, laid out as the real ones are.

They have the same files, classes, names of weights and oddities, and are only smaller.
`checkpoint("sd21", folder)` writes one and returns its folder. Another module adds kinds of its own by
`@makes("name")` and is then imported by the tests that want them."""
import json, shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from diffda.models import quiet
from diffda.places import nano_world
from diffda.torch_core import seeded

MAKERS = {}
# pixels of an image; width of all that is a transformer
SIDE, DIM = 64, 32
TOKENIZER = nano_world("generator", "tokenizer")
# OpenAI's
MEAN, STD = (.48145466, .4578275, .40821073), (.26862954, .26130258, .27577711)

def makes(kind:str):
    "Decorator: `maker(folder)` writes the checkpoint called `kind`."
    return lambda maker: MAKERS.setdefault(kind, maker)

def checkpoint(kind:str, folder) -> Path:
    "Write the checkpoint `kind` into `folder`, the same weights each time."
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with quiet(), seeded("tiny", kind):
        MAKERS[kind](folder)
    return folder

def edit_json(path, **changes):
    "Change keys of a JSON file, which need not exist."
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**before, **changes}, indent=2))

def renamed(path, old_to_new, drop=(), **more):
    "Rewrite a safetensors file: `old_to_new(name)` for each name; `more` are further tensors."
    weights = {old_to_new(k): v for k, v in load_file(path).items() if k not in drop}
    save_file({**weights, **more}, path, metadata={"format": "pt"})

# parts

def tokenizer(folder, pad="<|endoftext|>"):
    "CLIP's tokenizer with a small vocabulary, for 77 tokens."
    shutil.copytree(TOKENIZER, folder, dirs_exist_ok=True)
    edit_json(folder/"tokenizer_config.json", model_max_length=77, pad_token=pad)
    edit_json(folder/"special_tokens_map.json", pad_token=pad)
    return len(json.loads((folder/"vocab.json").read_text()))

TOWER = dict(hidden_size=DIM, intermediate_size=2*DIM, num_hidden_layers=2, num_attention_heads=2,
             projection_dim=DIM)

def text_config(words:int, **more):
    "Of a text tower that knows so many `words`; its last two ids begin and end a text."
    from transformers import CLIPTextConfig
    ids = dict(bos_token_id=words - 2, eos_token_id=words - 1, pad_token_id=words - 1)
    return CLIPTextConfig(**{**TOWER, **ids, **dict(vocab_size=words, max_position_embeddings=77), **more})

def vision_config(side:int=32):
    "Of an image tower for images of `side` pixels."
    from transformers import CLIPVisionConfig
    return CLIPVisionConfig(**TOWER, image_size=side, patch_size=8)

def processor(folder, side:int=32):
    "The image processor of the year 2022: sizes are numbers, and the class has its old name."
    folder.mkdir(parents=True, exist_ok=True)
    edit_json(folder/"preprocessor_config.json", crop_size=side, size=side, do_center_crop=True,
              do_normalize=True, do_resize=True, resample=3, image_mean=MEAN, image_std=STD,
              feature_extractor_type="CLIPFeatureExtractor")

# what diffusers now has in an autoencoder's attention -> what it had at first
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
# what the config of an autoencoder did not have at first
NEW_SETTINGS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast",
                "use_quant_conv", "use_post_quant_conv", "mid_block_add_attention")

def vae(folder):
    "AutoencoderKL with a factor of 8, as diffusers had it at first."
    from diffusers import AutoencoderKL
    AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"]*4, up_block_types=["UpDecoderBlock2D"]*4,
        block_out_channels=[8]*4, layers_per_block=1, latent_channels=4, norm_num_groups=4,
        sample_size=SIDE).save_pretrained(folder)
    def old(name):
        if ".attentions." not in name: return name
        for new, was in OLD_NAMES.items():
            name = name.replace(f".{new}.", f".{was}.")
        return name
    renamed(folder/"diffusion_pytorch_model.safetensors", old)
    config = json.loads((folder/"config.json").read_text())
    config = {name: value for name, value in config.items() if name not in NEW_SETTINGS}
    (folder/"config.json").write_text(json.dumps(config))

def unet(folder, **more):
    "A U-Net of two levels; `more` overrules its settings."
    from diffusers import UNet2DConditionModel
    settings = dict(
        sample_size=SIDE//8, in_channels=4, out_channels=4, block_out_channels=[8, 16], layers_per_block=1,
        down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"], cross_attention_dim=DIM, attention_head_dim=2,
        norm_num_groups=4)
    UNet2DConditionModel(**{**settings, **more}).save_pretrained(folder)

def scheduler(folder, kind:str, **more):
    "The config of a scheduler of class `kind` with Stable Diffusion's noise."
    folder.mkdir(parents=True, exist_ok=True)
    edit_json(folder/"scheduler_config.json", _class_name=kind, _diffusers_version="0.6.0", beta_start=.00085,
              beta_end=.012, beta_schedule="scaled_linear", num_train_timesteps=1000, trained_betas=None,
              **more)

def index(folder, pipeline:str, checked:bool, sched:str):
    "What a pipeline of class `pipeline` is made of; `checked`: with a safety checker."
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"] if checked else [None, None]
    edit_json(folder/"model_index.json", _class_name=pipeline, _diffusers_version="0.6.0",
              feature_extractor=["transformers", "CLIPImageProcessor"], safety_checker=checker,
              requires_safety_checker=checked, scheduler=["diffusers", sched],
              text_encoder=["transformers", "CLIPTextModel"], tokenizer=["transformers", "CLIPTokenizer"],
              unet=["diffusers", "UNet2DConditionModel"], vae=["diffusers", "AutoencoderKL"])

def text_encoder(folder, words:int, **more):
    "CLIP's text tower with the prefix and the buffer that older versions of transformers wrote."
    from transformers import CLIPTextModel
    CLIPTextModel(text_config(words, **more)).save_pretrained(folder)
    def old(name): return name if name.startswith("text_model.") else f"text_model.{name}"
    positions = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    renamed(folder/"model.safetensors", old, **positions)

# whole checkpoints

def _sd1(folder, pipeline, sched, in_channels=4, **more):
    words = tokenizer(folder/"tokenizer")
    text_encoder(folder/"text_encoder", words, hidden_act="quick_gelu")
    vae(folder/"vae")
    unet(folder/"unet", in_channels=in_channels)
    safety_checker(folder/"safety_checker")
    processor(folder/"feature_extractor")
    scheduler(folder/"scheduler", sched, **more)
    index(folder, pipeline, True, sched)

@makes("sd15")
def sd15(folder):
    "Stable Diffusion 1.5."
    _sd1(folder, "StableDiffusionPipeline", "PNDMScheduler", set_alpha_to_one=False, skip_prk_steps=True,
         steps_offset=1, clip_sample=False)

@makes("instruct-pix2pix")
def instruct_pix2pix(folder):
    "InstructPix2Pix: Stable Diffusion 1.5 with a second input."
    _sd1(folder, "StableDiffusionInstructPix2PixPipeline", "EulerAncestralDiscreteScheduler", in_channels=8,
         prediction_type="epsilon", steps_offset=1)

@makes("sd21")
def sd21(folder):
    """Predicts velocity; linear projections, heads of one width, no safety checker.

    Its text encoder is OpenCLIP's without the last layer, padded with '!'."""
    words = tokenizer(folder/"tokenizer", "!")
    text_encoder(folder/"text_encoder", words, hidden_act="gelu", num_hidden_layers=3, projection_dim=16,
                 pad_token_id=1, bos_token_id=0, eos_token_id=2)
    vae(folder/"vae")
    unet(folder/"unet", use_linear_projection=True, attention_head_dim=[1, 2], upcast_attention=True)
    processor(folder/"feature_extractor")
    scheduler(folder/"scheduler", "DDIMScheduler", prediction_type="v_prediction", clip_sample=False,
              set_alpha_to_one=False, skip_prk_steps=True, steps_offset=1)
    index(folder, "StableDiffusionPipeline", False, "DDIMScheduler")

def clip_config(words:int, **more):
    "Of a text and an image tower; `more` are settings of the text tower."
    from transformers import CLIPConfig
    text, vision = text_config(words, **more).to_dict(), vision_config().to_dict()
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=DIM)

@makes("clip")
def clip(folder):
    "OpenAI's CLIP."
    from transformers import CLIPModel
    words = tokenizer(folder)
    CLIPModel(clip_config(words, hidden_act="quick_gelu")).save_pretrained(folder)
    processor(folder)

@makes("safety-checker")
def safety_checker(folder, threshold:float=1.):
    "Flags an image whose cosine with one of the concepts is above `threshold`; 1: none, -1: all."
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    model = StableDiffusionSafetyChecker(clip_config(99))
    for name in ("concept_embeds", "special_care_embeds"):
        getattr(model, name).data.normal_()
        getattr(model, f"{name}_weights").data.fill_(threshold)
    model.save_pretrained(folder)
    prefix = "vision_model.vision_model."
    def old(name):
        if name.startswith(prefix) or not name.startswith("vision_model."): return name
        return prefix + name.removeprefix("vision_model.")
    positions = {f"{prefix}embeddings.position_ids": torch.arange(17)[None]}
    renamed(folder/"model.safetensors", old, **positions)
    processor(folder)

# the ends of the names of the layers that LCM-LoRA changes
LCM_LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1",
              "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj")

@makes("lcm-lora")
def lcm_lora(folder, rank:int=4):
    "A LoRA for the U-Net of `sd15`, in half precision, with kohya's names and an alpha below the rank."
    from diffusers import UNet2DConditionModel
    with seeded("tiny", "lcm's unet"):
        unet(folder/"unet")
    layers = dict(UNet2DConditionModel.from_pretrained(folder/"unet").named_modules())
    shutil.rmtree(folder/"unet")
    out = {}
    for name, layer in layers.items():
        if not name.endswith(LCM_LAYERS): continue
        n_out, *shape = layer.weight.shape
        key, ones = f"lora_unet_{name.replace('.', '_')}", [1]*(len(shape) - 1)
        out[f"{key}.lora_down.weight"] = torch.randn(rank, *shape).half()*.2
        out[f"{key}.lora_up.weight"] = torch.randn(n_out, rank, *ones).half()*.2
        out[f"{key}.alpha"] = torch.tensor(rank/2).half()
    save_file(out, folder/"pytorch_lora_weights.safetensors", metadata={"format": "pt"})
