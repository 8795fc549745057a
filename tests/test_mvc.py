"MVC: Algorithm 1, the widened network, tuning that survives being killed, and images from two conditions."
import dataclasses, json, re
from pathlib import Path

import numpy as np, pytest, torch
from safetensors.torch import save_file

from diffda.backbone import EMBEDDINGS, LORA, TOKENS, get_backbone
from diffda.models import load_pipeline
from diffda.core import DiffDAError, canonical
from diffda.torch_core import generator_for
from diffda.data import get_split
from diffda.datasets.nano import COLOURS, PATTERNS
from diffda.finetune import fine_tune
from diffda.generate import Prompts, generate_pool
from diffda.method import get_method
from diffda.methods.mvc import (CAPTIONS, MVCGenerate, MVCTuning, caption_pool, embedded, guided, mix,
                                pair_loss, widened)
from diffda.settings import settled
from pools import ANY, LATENT, LEVELS, by_key, distance, encoded_as, some

B = get_backbone("nano")
TUNING = MVCTuning(steps=4, lr=1e-3, batch_size=4)
PART = MVCGenerate(num_inference_steps=4, num_copies=3)

@pytest.fixture(scope="module")
def few(): return some((0, 1, 30, 26, 225, 249))

@pytest.fixture(scope="module")
def tuned(few, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned")
    part = settled(TUNING, B, few.task)
    assert part.train(few, B, None, folder, 0, progress=False)["steps"] == 4
    return folder

@pytest.fixture(scope="module")
def pool(few, tuned, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool")
    return generate_pool(PART, few, folder, adaptation=str(tuned), batch_size=64)

def weights(folder): return (Path(folder)/"unet"/"diffusion_pytorch_model.safetensors").read_bytes()

# Algorithm 1

def by_the_letter(captions, P, Q, g):
    "The algorithm as it is printed, entry by entry, with places counted from 1."
    def draw(a, b): return a + torch.randint(b - a + 1, (), generator=g).item()
    def ordered_pair(n):
        p = torch.randperm(n, generator=g)[:2].tolist()
        return min(p) + 1, max(p) + 1
    K = len(captions)
    b = draw(1, K)
    mixed = [[float(x) for x in row] for row in captions[b-1]]
    m, d = len(mixed), len(mixed[0])
    # all but the base, beginning after it
    rest = [captions[(b + j) % K] for j in range(K - 1)]
    for _ in range(P):
        if not rest: break
        other = rest[draw(1, K - 1) - 1]
        r, s = ordered_pair(m)
        for i in range(r, s + 1):
            for j in range(1, d + 1): mixed[i-1][j-1] = float(other[i-1][j-1])
    for _ in range(Q):
        if not rest: break
        other = rest[draw(1, K - 1) - 1]
        u, v = ordered_pair(d)
        w = draw(1, m)
        for j in range(u, v + 1): mixed[w-1][j-1] = float(other[w-1][j-1])
    return torch.tensor(mixed)

@pytest.mark.parametrize("k, p, q", [(2, 1, 0), (2, 0, 1), (3, 2, 4), (7, 5, 9), (1, 2, 4)])
def test_equal_to_the_algorithm_by_the_letter(k, p, q):
    captions = torch.randn(k, 6, 9, generator=torch.Generator().manual_seed(k))
    for seed in range(20):
        printed = by_the_letter(captions, p, q, generator_for(seed))
        assert torch.equal(mix(captions, p, q, generator_for(seed)), printed)

def test_what_mixing_leaves_alone():
    e = torch.arange(5.)[:, None, None].expand(5, 8, 16)
    def base(i): return float(mix(e, 0, 0, generator_for(i))[0, 0])
    def usual(rows): return rows.mode().values.mode().values
    # without mixing a random member, and one that is alone stays as it is
    assert {base(i) for i in range(60)} == set(range(5))
    assert torch.equal(mix(e[3:4], 2, 4, generator_for(0)), e[3])
    for i in range(40):
        coarse, fine = mix(e, 1, 0, generator_for(i)), mix(e, 0, 1, generator_for(i))
        # whole rows, from another caption
        assert (coarse == coarse[:, :1]).all() and 2 <= (coarse[:, 0] != usual(fine)).sum() <= 8
        changed = fine != usual(fine)
        assert (changed.any(1).sum() == 1) and 2 <= changed.sum() <= 16
    # the captions stay as they are
    assert torch.equal(e, torch.arange(5.)[:, None, None].expand(5, 8, 16))
    # the first and the last token are reached
    changed = torch.stack([mix(e, 1, 0, generator_for(i))[:, 0] != base(i) for i in range(400)])
    places = changed.float().mean(0)
    assert places.min() > .2 and abs(float(places[0] - places[-1])) < .1

# captions

def test_captions(few, tmp_path):
    colour, ground = "|".join(COLOURS), "|".join(PATTERNS)
    found = caption_pool(few, "attributes", few.class_names)
    assert [len(texts) for texts in found.values()] == [2, 2, 0, 0, 0, 0, 0, 0, 0, 2]
    for name, texts in found.items():
        place = f"(plain ({colour})|(an? )?({colour}) ({ground}))"
        pattern = rf"This is an image of {name}\. ({colour}), on {place}"
        assert all(re.fullmatch(pattern, text) for text in texts)
    path = tmp_path/"blip.json"
    path.write_text(json.dumps({i: f"a thing number {k}" for k, i in enumerate(few.train.ids)}))
    own = caption_pool(few, str(path), [f"<{n}>" for n in few.class_names])
    assert own["t-shirt"] == [f"This is an image of <t-shirt>. a thing number {k}" for k in (0, 1)]
    path.write_text(json.dumps({few.train.ids[0]: "a"}))
    with pytest.raises(DiffDAError, match="no caption for 5 of 6 training images"):
        caption_pool(few, str(path), few.class_names)

def test_a_changed_caption_file_is_another_setting(tmp_path):
    path = tmp_path/"captions.json"
    path.write_text("{}")
    one = canonical(MVCTuning(captions=str(path)))
    path.write_text('{"a": "b"}')
    two = canonical(dataclasses.replace(MVCTuning(captions=str(path)), steps=None))
    assert one != two and one["captions_key"] and canonical(MVCTuning())["captions_key"] is None
    with pytest.raises(DiffDAError, match="there is no file"): MVCTuning(captions=str(tmp_path/"none.json"))

# the network

def test_widened_network_says_what_the_old_one_says():
    unet = load_pipeline(B, "cpu", None).unet
    wide = widened(unet)
    g = torch.Generator().manual_seed(0)
    z, image, text = (torch.randn(3, *shape, generator=g) for shape in (LATENT, LATENT, (32, 128)))
    t = torch.tensor([1, 400, 999])
    with torch.no_grad():
        ours, theirs = wide(torch.cat([z, image], 1), t, text).sample, unet(z, t, text).sample
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert wide.config.in_channels == 2*LATENT[0] == 2*unet.config.in_channels

def test_the_loss_by_hand(few, monkeypatch):
    "Recover one batch from what the network is called with, and compute its loss anew."
    from diffusers import DDPMScheduler
    from diffda.finetune import Latents, frozen, mirrored
    pipe = frozen(B)
    latents = Latents(pipe, few.train, lambda im, i: mirrored(im, 32, 0.), 32)
    labels = few.train.labels.tolist()
    def captions(y): return [f"This is an image of {few.class_names[y]}. {word}" for word in ("", "pink")]
    members = {y: embedded(pipe, captions(y)) for y in set(labels)}
    seen, part = [], dataclasses.replace(TUNING, batch_size=200, dropped=.25)
    def unet(x, t, text):
        seen.append((x, t, text))
        return type("Out", (), {"sample": torch.zeros_like(x[:, :LATENT[0]])})
    loss = pair_loss(pipe, unet, latents, labels, members, part, 0)(3, list(range(200)))
    (x, t, text), = seen
    noisy, image = x.split(LATENT[0], 1)
    dropped = (image == 0).flatten(1).all(1)
    empty = embedded(pipe, [""])[0]
    # both are dropped together
    assert torch.equal((text == empty).flatten(1).all(1), dropped) and .15 < dropped.float().mean() < .35
    means = latents.mean.flatten(1)
    pair = [int((means - v).abs().sum(1).argmin()) for v in image.flatten(1)]
    # unscaled means
    assert all(torch.equal(latents.mean[p], v) for p, v, gone in zip(pair, image, dropped) if not gone)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    a = scheduler.alphas_cumprod[t]
    z0 = means*latents.factor
    def nearest(noisy, share): return min(range(6), key=lambda k: float((noisy - share.sqrt()*z0[k]).norm()))
    source = [nearest(*each) for each in zip(noisy.flatten(1), a)]
    # where the image can still be told from the noise
    early = (t < 150).tolist()
    assert sum(early) > 15
    told = [(s, p) for s, p, e, gone in zip(source, pair, early, dropped) if e and not gone]
    # another one of the class, or itself
    assert all(labels[s] == labels[p] for s, p in told) and {s == p for s, p in told} == {True, False}
    # a silent network: the square of what it should tell, the velocity of the noise that was drawn
    own = generator_for(0, "pairs", 3)
    torch.rand(3, 200, generator=own, dtype=torch.float64)
    _, noise = torch.randn(2, 200, *LATENT, generator=own)
    share = a[:, None, None, None]
    z = (noisy - (1 - share).sqrt()*noise)/share.sqrt()
    assert scheduler.config.prediction_type == "v_prediction" and loss.shape == (200,)
    assert torch.allclose(loss, (scheduler.get_velocity(z, noise, t)**2).mean((1, 2, 3)), rtol=1e-3)
    # mixtures, not captions
    assert len({v.numpy().tobytes() for v in text[~dropped]}) > 4

def test_what_tuning_leaves(few, tuned):
    assert sorted(p.name for p in tuned.iterdir()) == ["captions.json", "loss.csv", "samples.png", "unet"]
    assert json.loads((tuned/CAPTIONS).read_text()) == caption_pool(few, "attributes", few.class_names)
    unet = load_pipeline(B, "cpu", str(tuned)).unet
    assert unet.config.in_channels == 2*LATENT[0]
    assert unet.conv_in.weight[:, LATENT[0]:].abs().max() > 0

def test_tuning_repeats_bit_for_bit_and_leaves_the_random_state(few, tuned, tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    fine_tune(TUNING, few, tmp_path/"again", progress=False)
    assert weights(tmp_path/"again") == weights(tuned) and torch.equal(before, torch.get_rng_state())
    fine_tune(dataclasses.replace(TUNING, steps=1), few, tmp_path/"other", seed=1, progress=False)
    assert weights(tmp_path/"other") != weights(tuned)

def test_killed_and_resumed(few, tuned, tmp_path, monkeypatch):
    from diffda import finetune
    class Killed(BaseException): pass
    calls, resumable = [], finetune.resumable
    def dying(n, step, *a, **k):
        def counted(i):
            if len(calls) == 2: raise Killed
            calls.append(i)
            return step(i)
        # a checkpoint after every step
        return resumable(n, counted, *a, **{**k, "every_s": -1})
    monkeypatch.setattr(finetune, "resumable", dying)
    with pytest.raises(Killed): fine_tune(TUNING, few, tmp_path, progress=False)
    assert calls == [0, 1] and (tmp_path/"checkpoint0.pt").exists() and not (tmp_path/"unet").exists()
    monkeypatch.setattr(finetune, "resumable", resumable)
    fine_tune(TUNING, few, tmp_path, progress=False)
    assert weights(tmp_path) == weights(tuned)
    assert (tmp_path/"loss.csv").read_text() == (tuned/"loss.csv").read_text()

def test_words_learned_before_are_taken_over(few, tmp_path):
    before = tmp_path/"before"
    before.mkdir()
    save_file({"<bag>": torch.ones(1, 128)}, before/EMBEDDINGS)
    (before/TOKENS).write_text(json.dumps({n: "<bag>" for n in few.class_names}))
    one_step = dataclasses.replace(TUNING, steps=1)
    fine_tune(one_step, few, tmp_path/"after", previous=str(before), progress=False)
    assert {EMBEDDINGS, TOKENS} <= {p.name for p in (tmp_path/"after").iterdir()}
    texts = json.loads((tmp_path/"after"/CAPTIONS).read_text()).values()
    assert all(text.startswith("This is an image of <bag>.") for own in texts for text in own)
    (before/LORA).write_bytes(b"")
    with pytest.raises(DiffDAError, match="Only TextualInversion can come before it"):
        fine_tune(TUNING, few, tmp_path/"x", previous=str(before), progress=False)

def test_settings_that_make_no_sense():
    for bad in (dict(steps=0), dict(lr=-1.), dict(num_embeddings=0)):
        with pytest.raises(DiffDAError, match="MVCTuning: .* is (above 0|at least 1)"): MVCTuning(**bad)
    with pytest.raises(DiffDAError, match=r"MVCTuning: dropped lies in \[0, 1\); found 1"):
        MVCTuning(dropped=1.)

# guidance

@pytest.fixture(scope="module")
def conditions(tuned):
    pipe = PART.load(B, "cpu", str(tuned))
    g = torch.Generator().manual_seed(0)
    noise, image = (torch.randn(2, *LATENT, generator=g) for _ in range(2))
    prompts = Prompts(pipe)
    return pipe, noise, image, prompts.texts(["a photo of a bag", "a photo of a dress"]), prompts.empty

@pytest.mark.parametrize("w", [1., 3.])
def test_guidance_by_hand(conditions, w):
    pipe, noise, image, text, empty = conditions
    s, z = type(pipe.scheduler).from_config(pipe.scheduler.config), noise
    s.set_timesteps(4)
    with torch.no_grad():
        for t in s.timesteps:
            given = pipe.unet(torch.cat([z, image], 1), t, text).sample
            null = pipe.unet(torch.cat([z, 0*image], 1), t, empty.expand(2, -1, -1)).sample
            z = s.step(w*given + (1 - w)*null, t, z).prev_sample
        direct = pipe.image_processor.postprocess(pipe.vae.decode(z/pipe.vae.config.scaling_factor).sample)
    made = guided(pipe, noise, image, text, empty, guidance=w, steps=4)
    assert max(np.abs(np.asarray(a).astype(int) - b).max() for a, b in zip(made, direct)) <= LEVELS

def test_equal_to_instruct_pix2pix_with_both_scales_equal(conditions):
    from diffusers import StableDiffusionInstructPix2PixPipeline
    pipe, noise, image, text, empty = conditions
    other = StableDiffusionInstructPix2PixPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    with encoded_as(other, image):
        direct = other(image=[ANY]*2, latents=noise, prompt_embeds=text, guidance_scale=3.,
                       negative_prompt_embeds=empty.expand(2, -1, -1), image_guidance_scale=3.,
                       num_inference_steps=4).images
    made = guided(pipe, noise, image, text, empty, guidance=3., steps=4)
    assert max(np.abs(np.asarray(a).astype(int) - b).max() for a, b in zip(made, direct)) <= LEVELS

# the same images

def test_rows(few, pool):
    label = dict(zip(few.train.ids, few.train.labels))
    r = pool.rows
    assert len(r) == 18 and (r.condition.map(label) == r.label).all()
    assert (r.condition != r.source_id).any() and (r.condition == r.source_id).any()
    assert r.prompt[0] == "This is an image of t-shirt" and (r.steps == 4).all()
    assert len({v.tobytes() for v in by_key(pool).values()}) == 18

@pytest.mark.parametrize("size", [1, 7])
def test_batch_size_does_not_matter(few, tuned, pool, tmp_path, size):
    other = generate_pool(PART, few, tmp_path, adaptation=str(tuned), batch_size=size)
    assert distance(other, pool) <= LEVELS

def test_order_does_not_matter(tuned, pool, tmp_path):
    turned = some((249, 225, 26, 30, 1, 0))
    other = generate_pool(PART, turned, tmp_path, adaptation=str(tuned), batch_size=7)
    assert distance(other, pool) <= LEVELS

def test_two_half_shards(few, tuned, pool, tmp_path):
    assert generate_pool(PART, few, tmp_path, adaptation=str(tuned), batch_size=4, shard=(0, 2)) is None
    whole = generate_pool(PART, few, tmp_path, adaptation=str(tuned), batch_size=4, shard=(1, 2))
    assert whole.rows.equals(pool.rows) and distance(whole, pool) <= LEVELS

def test_without_tuning_there_is_nothing_to_draw_with(few, tmp_path):
    with pytest.raises(DiffDAError, match="MVCTuning has to run before MVCGenerate"):
        generate_pool(PART, few, tmp_path)

def test_the_method():
    m = get_method("mvc").at(get_split("nano-digits-5", 0).task, **{"MVCTuning.steps": 3, "num_copies": 2})
    tuning = m.finetune
    # on nano the learning rate is the budget's, since nobody asks for another
    assert (m.utilize.name, m.generate.num_copies, tuning.steps, tuning.lr) == ("two-phase", 2, 3, 3e-4)
    own = get_method("mvc")
    assert own.parts == {"finetune": "MVCTuning", "generate": "MVCGenerate", "utilize": "two-phase"}
    assert own.generate.num_copies == 4
def test_captions_that_are_no_json(few, tmp_path):
    path = tmp_path/"captions.json"
    for text in ("{broken", "3"):
        path.write_text(text)
        with pytest.raises(DiffDAError, match="is not a JSON file of the form"):
            caption_pool(few, str(path), few.class_names)
