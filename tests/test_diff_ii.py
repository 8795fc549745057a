"Diff-II: inversion and its cache, the circle, two prompts in one denoising; the same images in any batch."
import dataclasses, math

import numpy as np, pytest, torch

from diffda import generate
from diffda.backbone import get_backbone
from diffda.models import encode, load_pipeline
from diffda.core import DiffDAError
from diffda.data import get_split
from diffda.generate import Prompts, Studio, generate_pool
from diffda.method import get_method
from diffda.methods import diff_ii as module
from diffda.methods.diff_ii import (CircleInterpolation, circle, ddim, inversions, invert, suffixed_steps,
                                    two_stage)
from diffda.utilize import GlobalReplacement
from pools import LATENT, LEVELS, distance, some

SUFFIXES = ("on red checks", "against plain green", "in front of blue spots", "on an orange gradient")
PART = CircleInterpolation(inversion_steps=4, num_inference_steps=4, num_copies=3, suffix_fraction=.5,
                           suffixes=SUFFIXES)
NANO = get_backbone("nano")

def studio_of(part, split, folder, adaptation=None, rows=None):
    return Studio(part, split, NANO, "cpu", adaptation, rows or part.rows(split, NANO, 0), folder)

@pytest.fixture(scope="module")
def few(): return some((0, 1, 30, 26, 225, 249))

@pytest.fixture(scope="module")
def pool(few, tmp_path_factory):
    return generate_pool(PART, few, tmp_path_factory.mktemp("pool"), batch_size=64)

@pytest.fixture(scope="module")
def pipe(): return PART.load(NANO, "cpu")

# the circle

@pytest.fixture
def noises():
    z = torch.randn(2, *LATENT, generator=torch.Generator().manual_seed(0))
    return z[0], z[1]*z[0].norm()/z[1].norm()                     # equal norms

def test_where_the_circle_passes(noises):
    z1, z2 = noises
    theta = math.acos(float((z1*z2).sum()/z1.norm()/z2.norm()))
    for angle, expected in ((0, z1), (2*math.pi, z1), (-theta, z2), (2*math.pi - theta, z2), (math.pi, -z1)):
        assert torch.allclose(circle(z1, z2, angle), expected, atol=1e-5), angle

@pytest.mark.parametrize("alpha", [.1, .7, 1.9, 3.3])
def test_equal_to_the_formula_and_in_the_plane(noises, alpha):
    z1, z2 = noises
    a, b = z1.double().flatten().numpy(), z2.double().flatten().numpy()
    theta = np.arccos(a @ b/np.linalg.norm(a)/np.linalg.norm(b))
    formula = np.sin((1 + alpha)*theta)/np.sin(theta)*a - np.sin(alpha*theta)/np.sin(theta)*b
    z = circle(z1, z2, alpha*theta).double().flatten().numpy()
    assert np.abs(z - formula).max() < 1e-5
    assert np.isclose(np.linalg.norm(z), np.linalg.norm(a), rtol=1e-5)
    rest = z - np.stack([a, b], 1) @ np.linalg.lstsq(np.stack([a, b], 1), z, rcond=None)[0]
    assert np.linalg.norm(rest) < 1e-4

def test_nearly_parallel_noises_are_left_alone(noises):
    z1, z2 = noises
    for other in (z1, z1.half().float(), z1 + 1e-4*z2, 2*z1, -z1):
        assert torch.equal(circle(z1, other, 1.), z1)
    assert circle(z1.half(), z2.half(), 1.).dtype == torch.float32

# inversion

def test_inversion_is_undone_by_denoising(few, pipe):
    z = encode(pipe, [few.train.read(i) for i in range(3)], 32)
    words = Prompts(pipe).texts([f"a photo of a {few.class_names[c]}" for c in few.train.labels[:3]])
    noise, scheduler = invert(pipe, z, words, 200), ddim(pipe)
    again = pipe(latents=noise, prompt_embeds=words, guidance_scale=1., num_inference_steps=200,
                 output_type="latent").images
    assert type(pipe.scheduler) is type(scheduler) and float((again - z).norm()/z.norm()) < .03
    assert noise.dtype == torch.float32 and float((noise - z).norm()/z.norm()) > .5

def test_the_levels_of_both_directions_agree(pipe):
    for steps in (4, 25, 200):
        up, down = ddim(pipe, "DDIMInverseScheduler"), ddim(pipe)
        for scheduler in (up, down): scheduler.set_timesteps(steps)
        assert up.timesteps.tolist() == down.timesteps.tolist()[::-1]
        assert torch.equal(up.alphas_cumprod, down.alphas_cumprod)
        assert up.initial_alpha_cumprod == down.final_alpha_cumprod
        assert not (up.config.clip_sample or down.config.clip_sample)
        x, e = torch.randn(2, *LATENT, generator=torch.Generator().manual_seed(1))
        # where the network sees the same noise, a step down undoes a step up
        for t in up.timesteps:
            before = int(t) - 1000//steps
            low = up.alphas_cumprod[before] if before >= 0 else up.initial_alpha_cumprod
            higher = up.step(velocity(x, e, low), t, x).prev_sample
            again = down.step(velocity(higher, e, down.alphas_cumprod[t]), t, higher).prev_sample
            assert torch.allclose(again, x, atol=1e-3)

def velocity(x, noise, a):
    "What a network tells that sees `noise` in `x`, of which the share `a` (squared) is signal."
    return a.sqrt()*noise - (1 - a).sqrt()*(x - (1 - a).sqrt()*noise)/a.sqrt()

def test_unusable_step_counts():
    with pytest.raises(DiffDAError, match="600 steps of DDIM do not reach .* divisor of 1000"):
        CircleInterpolation(inversion_steps=600)
    for name, bad in (("num_inference_steps", 0), ("inversion_steps", 2000)):
        with pytest.raises(DiffDAError, match=rf"{name} lies in \[1, 1000\]; found {bad}"):
            CircleInterpolation(**{name: bad})
    with pytest.raises(DiffDAError, match=r"suffix_fraction lies in \[0, 1\]; found 1.2"):
        CircleInterpolation(suffix_fraction=1.2)

# two prompts

@pytest.mark.parametrize("guidance", [1., 3.])
def test_equal_to_diffusers_and_to_a_loop_by_hand(pipe, guidance):
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    stock = StableDiffusionPipeline.from_pretrained(NANO.source, safety_checker=None,
                                                    requires_safety_checker=False)
    stock.scheduler = DDIMScheduler(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear",
                                    clip_sample=False, set_alpha_to_one=False, steps_offset=1,
                                    prediction_type="v_prediction")
    stock.set_progress_bar_config(disable=True)
    z = torch.randn(2, *LATENT, generator=torch.Generator().manual_seed(2))
    prompts = Prompts(pipe)
    texts = "a photo of a bag on red checks.", "a photo of a bag"
    first, then = (prompts.texts([text]*2) for text in texts)
    empty = prompts.empty
    made = {fraction: two_stage(pipe, z, first, then, empty, fraction=fraction, steps=5, guidance=guidance)
            for fraction in (0, .4, 1)}
    for f, text in ((0, "a photo of a bag"), (1, "a photo of a bag on red checks.")):
        direct = stock([text]*2, latents=z, num_inference_steps=5, guidance_scale=guidance).images
        assert all(np.array_equal(a, b) for a, b in zip(made[f], direct))
    stock.scheduler.set_timesteps(5)
    with torch.no_grad():
        for i, t in enumerate(stock.scheduler.timesteps):
            words = first if i < 2 else then
            told, null = stock.unet(z, t, words).sample, stock.unet(z, t, empty.expand(2, -1, -1)).sample
            z = stock.scheduler.step(null + guidance*(told - null), t, z).prev_sample
        direct = stock.image_processor.postprocess(stock.vae.decode(z/stock.vae.config.scaling_factor).sample)
    assert max(np.abs(np.asarray(a).astype(int) - b).max() for a, b in zip(made[.4], direct)) <= LEVELS
    assert not np.array_equal(made[0][0], made[1][0])

def test_the_suffixed_share(pipe):
    assert [suffixed_steps(pipe, f, 25) for f in (0, .1, .3, .5, 1)] == [0, 2, 7, 12, 25]
    assert [suffixed_steps(pipe, .3, n) for n in (4, 5, 10, 50)] == [1, 1, 3, 15]

# what the rows say

def test_partners_and_phrases(few):
    whole = get_split("nano-digits-5", 0)
    part = CircleInterpolation(suffixes=SUFFIXES, prompt="metaclass", num_copies=4)
    rows = part.rows(whole, NANO, 0)
    label = dict(zip(whole.train.ids, whole.train.labels))
    assert all(r["partner"] != r["source_id"] and 0 <= r["turn"] < 1 for r in rows)
    assert all(label[r["partner"]] == r["label"] == r["source_label"] for r in rows)
    assert len({r["partner"] for r in rows}) > 15 and np.std([r["turn"] for r in rows]) > .2
    for i in range(0, len(rows), 4):
        phrases = [r["prompt"].removeprefix(r["plain_prompt"] + " ") for r in rows[i:i+4]]
        assert sorted(phrases) == sorted(s + "." for s in SUFFIXES)
        assert rows[i]["plain_prompt"] == f"a photo of a {whole.class_names[rows[i]['label']]} digit"
    many = dataclasses.replace(PART, num_copies=10).rows(few, NANO, 0)[:10]
    # 10 copies, 4 phrases: 3, 3, 2, 2
    assert max(np.unique([r["prompt"] for r in many], return_counts=True)[1]) == 3

def test_one_shot(tmp_path):
    one = some((0, 30, 225))
    made = generate_pool(PART, one, tmp_path)
    assert made.rows.partner.isna().all() and made.rows.turn.isna().all()
    studio = studio_of(PART, one, tmp_path)
    z, words = inversions(studio, one.train.ids, PART), studio.prompts
    r = made.rows.iloc[4]
    first, then = words.texts([r.prompt]), words.texts([r.plain_prompt])
    direct = two_stage(studio.pipe, z[r.source_id][None], first, then, words.empty, fraction=.5, steps=4,
                       guidance=r.guidance)[0]
    assert np.abs(np.asarray(direct).astype(int) - np.asarray(made.image(4))).max() <= LEVELS

def test_missing_phrases(few):
    bare = dataclasses.replace(few, task=dataclasses.replace(few.task, metaclass=None))
    with pytest.raises(DiffDAError, match=r"none for task 'nano-fashion' .*suffixes=.*suffix_fraction=0"):
        CircleInterpolation().rows(bare, NANO, 0)
    rows = CircleInterpolation(suffix_fraction=0).rows(bare, NANO, 0)
    assert all(r["prompt"] == r["plain_prompt"] for r in rows)
    assert CircleInterpolation(suffixes="on red checks").suffixes == ("on red checks",)

# the same images

@pytest.mark.parametrize("size", [1, 7])
def test_batch_size_does_not_matter(few, pool, tmp_path, size):
    assert distance(generate_pool(PART, few, tmp_path, batch_size=size), pool) <= LEVELS

def test_order_does_not_matter(pool, tmp_path):
    other = generate_pool(PART, some((249, 225, 26, 30, 1, 0)), tmp_path, batch_size=7)
    assert distance(other, pool) <= LEVELS

def test_two_half_shards(few, pool, tmp_path):
    assert generate_pool(PART, few, tmp_path, batch_size=4, shard=(0, 2)) is None
    whole = generate_pool(PART, few, tmp_path, batch_size=4, shard=(1, 2))
    assert whole.rows.equals(pool.rows) and distance(whole, pool) <= LEVELS

# the cache

@pytest.fixture
def counted(monkeypatch):
    "Sizes of the batches that `invert` gets."
    sizes = []
    monkeypatch.setattr(module, "invert", lambda pipe, z, *a: sizes.append(len(z)) or invert(pipe, z, *a))
    return sizes

def test_inverted_once_and_kept_on_resume(few, pool, tmp_path, counted, monkeypatch):
    first = generate_pool(PART, few, tmp_path, batch_size=4)
    assert counted == [6]
    digest, calls = first.digest(), []
    for i in (2, 9): (tmp_path/first.rows.file_name[i]).unlink()
    load = load_pipeline
    pipe = load(get_backbone("nano"), "cpu", None)
    hook = pipe.unet.register_forward_hook(lambda *a: calls.append(1))
    monkeypatch.setattr(generate, "load_pipeline", lambda *a, **k: pipe)
    try: again = generate_pool(PART, few, tmp_path, batch_size=4)
    finally: hook.remove()
    # two batches drawn, nothing inverted
    assert counted == [6] and again.digest() == digest and len(calls) == 2*PART.num_inference_steps

def test_a_torn_batch_of_inversions_is_made_whole_again(few, tmp_path, counted):
    first = generate_pool(PART, few, tmp_path, batch_size=4)
    files = sorted(tmp_path.rglob(".inversions/*.npy"))
    before = [f.read_bytes() for f in files]
    assert len(files) == 6
    for f in (files[1], tmp_path/first.rows.file_name[0], tmp_path/first.rows.file_name[17]): f.unlink()
    generate_pool(PART, few, tmp_path, batch_size=18)
    assert counted == [6, 6] and [f.read_bytes() for f in files] == before

def test_two_processes_share_the_inversions(few, tmp_path, counted):
    "A batch that somebody else is at is left to them until nothing else is missing."
    import fcntl, threading
    studio = studio_of(PART, few, tmp_path)
    ids = few.train.ids
    z = inversions(studio, ids, PART, size=2)
    other = studio_of(PART, few, tmp_path/"other", rows=studio.rows)
    folder = tmp_path/"other"/".inversions"
    folder.mkdir(parents=True)
    lock = open(folder/".0.lock", "w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    def finish():
        "The other process hands in the first batch and leaves."
        for i in ids[:2]: np.save(folder/f"{i}.npy", z[i].numpy())
        lock.close()
    counted.clear()
    timer = threading.Timer(1.5, finish)
    timer.start()
    got = inversions(other, ids, PART, size=2)
    timer.join()
    assert counted == [2, 2] and all(torch.equal(got[i], z[i]) for i in ids)

def test_another_adaptation_is_another_noise(few, tmp_path, counted):
    "Noise of other weights, steps or prompts is not taken: a pool's folder is for one of them only."
    from safetensors.torch import save_file
    from diffda.backbone import EMBEDDINGS
    adaptation = tmp_path/"adaptation"
    adaptation.mkdir()
    save_file({"<new>": torch.zeros(128)}, adaptation/EMBEDDINGS)
    slower, other = dataclasses.replace(PART, inversion_steps=5), dataclasses.replace(PART, prompt="class")
    first = generate_pool(PART, few, tmp_path/"pool")
    files = sorted((tmp_path/"pool"/".inversions").glob("*.npy"))
    before = [f.read_bytes() for f in files]
    for k, (part, tuned) in enumerate(((PART, adaptation), (other, None), (slower, None))):
        with pytest.raises(DiffDAError, match="holds images that were made with other settings"):
            generate_pool(part, few, tmp_path/"pool", adaptation=tuned)
        generate_pool(part, few, tmp_path/f"pool{k}", adaptation=tuned)
    assert counted == [6]*4
    # the first one's noise is still its own
    (tmp_path/"pool"/first.rows.file_name[0]).unlink()
    assert generate_pool(PART, few, tmp_path/"pool").digest() == first.digest()
    assert counted == [6]*4 and len(files) == 6 and [f.read_bytes() for f in files] == before

def test_pools_of_other_seeds_and_weights_have_other_folders():
    from diffda.jobs import plan
    def key(seed, **changes):
        job, = plan(["diff-ii"], ["nano-digits-5"], [seed], **changes)
        return job.pool.key
    keys = {key(0), key(1), key(0, **{"TextualInversion.steps": 7}), key(0, inversion_steps=100),
            key(0, suffix_fraction=1.)}
    assert len(keys) == 5

def test_a_pool_with_inversions_is_an_imagefolder(pool, tmp_path):
    from datasets import load_dataset
    ds = load_dataset("imagefolder", data_dir=str(pool.folder), split="train", cache_dir=str(tmp_path))
    assert len(ds) == len(pool) == 18 and {"partner", "turn", "plain_prompt"} <= set(ds.column_names)

# the method

def test_settings_per_task():
    from diffda.data import get_task
    m = get_method("diff-ii")
    five, fashion, scans = (m.at(get_task(t)) for t in ("nano-digits-5", "nano-fashion", "nano-scans-5"))
    assert five.utilize == GlobalReplacement(p=.5)
    assert (five.generate.prompt, five.generate.suffix_fraction) == ("metaclass", .3)
    shares = [m.at(get_task(f"nano-digits-{n}")).utilize.p for n in (1, 5, 10)]
    assert shares == [.7, .5, .3]
    assert (fashion.utilize.name, fashion.generate.prompt) == ("fc", "article")
    assert (scans.utilize.name, scans.generate.prompt, scans.generate.suffix_fraction) == ("fc", "medical", 0)
    assert m.parts["finetune"] == "TextualInversion >> DreamBoothLoRA"
