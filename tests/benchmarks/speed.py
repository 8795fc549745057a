"""How fast diffda generates, fine-tunes and trains with a generator of Stable Diffusion 1.5's size.

Its weights are random: speed depends on sizes, not on values.

    python tests/benchmarks/speed.py                      # needs a GPU and some minutes
    python tests/benchmarks/speed.py --size tiny          # the same on a tiny generator, to see that it runs

Each line is the median of the repeats with their spread, synchronised. `plain` is diffusers' own
image-to-image pipeline called once per real image with all its copies, as most published code does. Compare
numbers of one run only; nothing here decides whether a test passes."""
import argparse, json, statistics, sys, tempfile, time
from pathlib import Path

import numpy as np, torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import tiny
from diffda.backbone import get_backbone
from diffda.models import default_device, load_pipeline
from diffda.data import Split, Task, Training
from diffda.samples import Samples
from diffda.finetune import DreamBoothLoRA, TextualInversion, fine_tune
from diffda.generate import SDEdit, Studio, generate_pool, noise_for
from diffda.train import environment, fit
from diffda.classifiers import new_classifier
from diffda.utilize import RealOnly, label_matrix


def random_sd15(folder):
    "A pipeline with the sizes of Stable Diffusion 1.5, in half precision on disk."
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel
    # for its tokenizer
    small = tiny.checkpoint("sd15", Path(folder)/"small")
    pipe = StableDiffusionPipeline.from_pretrained(small, safety_checker=None, requires_safety_checker=False)
    unet = UNet2DConditionModel(
        sample_size=64, layers_per_block=2, block_out_channels=(320, 640, 1280, 1280),
        cross_attention_dim=768, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D",)*3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",)*3)
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",)*4,
        up_block_types=("UpDecoderBlock2D",)*4, layers_per_block=2, latent_channels=4, sample_size=512)
    text = CLIPTextModel(CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        vocab_size=49408))
    scheduler = PNDMScheduler(
        beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", skip_prk_steps=True,
        set_alpha_to_one=False, steps_offset=1)
    whole = StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=pipe.tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    whole.half().save_pretrained(Path(folder)/"sd15")
    return Path(folder)/"sd15"


def pictures(n, size, classes=4):
    "A split of `n` images of noise."
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    def read(i): return Image.fromarray(x[i])
    samples = Samples([f"im{i:04d}" for i in range(n)], np.arange(n) % classes, read, str)
    task = Task("speed", "speed", "paper", "conventional", n//classes, Training(), "speed", "sd15")
    return Split(task, 0, [f"kind {k}" for k in range(classes)], samples, None, samples, "speed")


def synchronise():
    "Wait until the GPU, if there is one, has done what it was told."
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(work, repeats):
    "(median, least, most) seconds of `work()`, and the peak of GPU memory in GiB; the first call warms up."
    on_gpu = torch.cuda.is_available()
    work()
    synchronise()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    took = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        synchronise()
        took.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated()/2**30 if on_gpu else float("nan")
    return statistics.median(took), min(took), max(took), peak


def timed_once(work):
    "The same for work that is done once, without a warm-up and without a peak."
    began = time.perf_counter()
    work()
    took = time.perf_counter() - began
    return took, took, took, float("nan")


class Notes:
    "What was measured: printed as it comes, and kept in `found`."
    def __init__(self): self.found = {}
    def __call__(self, what, images, took):
        median, low, high, peak = took
        rates = {"per_second": images/median, "slowest": images/high, "fastest": images/low}
        self.found[what] = {**rates, "peak_GiB": peak}
        spread = f"({images/high:.2f} to {images/low:.2f})"
        print(f"{what:42} {images/median:9.2f}/s  {spread}, peak {peak:.1f} GiB", flush=True)


def generation(note, source, folder, batches, repeats):
    "Images per second: plain diffusers, diffda in memory, diffda from disk to disk."
    b, device = get_backbone(source), default_device()
    part = SDEdit(prompt="article", strength=.9, num_inference_steps=25, num_copies=5)
    split = pictures(16, b.resolution)
    rows, pipe = part.rows(split, b, 0), load_pipeline(b, device)
    def plain():
        "One real image, five copies."
        same = rows[:5]
        pipe([r["prompt"] for r in same], image=[split.train.read(0)]*5, strength=.9, num_inference_steps=25,
             guidance_scale=b.guidance_scale, generator=noise_for(same))
    note("plain diffusers, 5 copies of an image", 5, timed(plain, repeats))
    for n in batches:
        studio = Studio(part, split, b, device, None, rows, str(folder))
        took = timed(lambda: part.draw(studio, rows[:n]), repeats)
        note(f"diffda, batch {n}, images in memory", n, took)
    few, most = pictures(8, b.resolution), max(batches)
    took = timed_once(lambda: generate_pool(part, few, folder/"pool", backbone=source, batch_size=most))
    note(f"diffda, batch {most}, disk to disk (once)", 40, took)


def fine_tuning(note, source, folder, steps):
    "Steps per second."
    split = pictures(16, get_backbone(source).resolution)
    inversion = TextualInversion(steps=steps, lr=1e-4, batch_size=16, initializer="the", hflip=.5)
    for tuning in (inversion, DreamBoothLoRA(steps=steps, lr=1e-5, batch_size=16)):
        name = type(tuning).__name__
        took = timed_once(lambda: fine_tune(tuning, split, folder/name, source, progress=False))
        note(f"{name}, steps of 16 images (once)", steps, took)


def classification(note, small:bool, repeats):
    "Images per second in training: ResNet-50 at 224, or the small network at 32 pixels."
    side, n = (32, 64) if small else (256, 512)
    own = dict(crop=32, classifier="small-resnet", pad=2) if small else dict(crop=224)
    training = Training(epochs=1, resize=side, **own)
    x = np.random.default_rng(0).integers(0, 256, (n, 3, side, side), dtype=np.uint8)
    y = np.arange(n) % 100
    def train():
        net = new_classifier(training.classifier, 100)
        with tempfile.TemporaryDirectory() as folder:
            fit(net, [x], label_matrix(y, 100), [], {"test": (x[:32], y[:32])}, training, RealOnly(),
                path=Path(folder)/"checkpoint.pt")
    note(f"{training.classifier}, one epoch of {n} images", n, timed(train, repeats))


def arguments():
    "What the command line asks for."
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--size", choices=("sd15", "tiny"), default="sd15")
    p.add_argument("--batches", type=int, nargs="+", default=[1, 8, 16, 32])
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--steps", type=int, default=20, help="steps of fine-tuning")
    p.add_argument("--json", help="file for the numbers")
    return p.parse_args()


def main():
    a, note = arguments(), Notes()
    note.found["environment"] = environment()
    print(note.found["environment"], flush=True)
    with tempfile.TemporaryDirectory() as temp:
        folder, small = Path(temp), a.size == "tiny"
        source = str(tiny.checkpoint("sd15", folder/"sd15") if small else random_sd15(folder))
        generation(note, source, folder, a.batches, a.repeats)
        fine_tuning(note, source, folder, a.steps)
        classification(note, small, a.repeats)
    if a.json:
        Path(a.json).write_text(json.dumps(note.found, indent=1))


if __name__ == "__main__":
    main()
