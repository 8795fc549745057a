"GIF: its score against NumPy, its step against differences, its images against a plain walk, in any batch."
import copy, dataclasses

import numpy as np, pytest, torch
from PIL import Image

from diffda.backbone import get_backbone
from diffda.models import encode, load_pipeline
from diffda.core import DiffDAError
from diffda.torch_core import generator_for
from diffda.data import get_split, get_task
from diffda.generate import SDEdit, Studio, generate_pool
from diffda.method import get_method
from diffda.methods import gif as module
from diffda.methods.gif import (ADJECTIVES, DOMAINS, GIF, ClipClassifier, decode, first_move, gif_score,
                                imagine, in_ball, clip_classifier, moved, turned, uphill)
from diffda.utilize import FullConcatenation, GlobalReplacement
from pools import LATENT, LEVELS, by_key, distance, from_latents, some

PART = GIF(strength=.5, num_inference_steps=4, num_copies=3)
NANO = get_backbone("nano")

@pytest.fixture(scope="module")
def few(): return some((0, 30, 126, 225))

@pytest.fixture(scope="module")
def pool(few, tmp_path_factory): return generate_pool(PART, few, tmp_path_factory.mktemp("gif"))

def studio_of(part, split, folder):
    return Studio(part, split, NANO, "cpu", None, part.rows(split, NANO, 0), folder)

def as_pixels(images):
    "PIL images of one size as (n, 3, h, w) in [0, 1]."
    return torch.stack([torch.from_numpy(np.array(im)).permute(2, 0, 1) for im in images]).float()/255

# the score

def softmax(x):
    e = np.exp(x - x.max())
    return e/e.sum()
def entropy(p): return -(p*np.log(p)).sum()

def score_by_numpy(v, p, p0, c):
    "The formula for one image, term by term."
    mean, total = softmax(v.mean(0)), 0
    for vj, pj in zip(v, p):
        own = softmax(vj)
        total += entropy(pj) - entropy(p0) + pj[c] + (mean*np.log(mean/own)).sum()
    return total/len(v)

@pytest.mark.parametrize("m", [1, 2, 5])
def test_score(m):
    g = generator_for("score", m)
    v = torch.randn(4, m, 16, generator=g)*3
    log_p = (torch.randn(4, m, 7, generator=g)*4).log_softmax(-1)
    log_p0 = torch.randn(4, 7, generator=g).log_softmax(-1)
    target = torch.tensor([0, 6, 3, 3])
    vs, ps, p0s = (x.double().numpy() for x in (v, log_p.double().exp(), log_p0.double().exp()))
    expected = [score_by_numpy(vs[i], ps[i], p0s[i], target[i]) for i in range(4)]
    assert np.allclose(gif_score(v, log_p, log_p0, target), expected, rtol=1e-4, atol=1e-4)

def test_terms_of_the_score():
    flat, sure = torch.full((1, 3, 4), .25).log(), torch.tensor([[1 - 3e-9, 1e-9, 1e-9, 1e-9]]).log()
    same = torch.ones(1, 3, 8)
    label = torch.tensor([0])
    # all that is new, a quarter of the class, no diversity
    assert gif_score(same, flat, sure, label).item() == pytest.approx(np.log(4) + .25, abs=1e-4)
    assert gif_score(same, sure[:, None].expand(-1, 3, -1), sure, label).item() == pytest.approx(1, abs=1e-4)
    varied = torch.randn(1, 3, 8, generator=generator_for("varied"))
    assert gif_score(varied, flat, sure, torch.tensor([0])) > gif_score(same, flat, sure, torch.tensor([0]))
    one = gif_score(varied[:, :1], flat[:, :1], sure, torch.tensor([0])).item()
    # one copy is its own mean
    assert one == pytest.approx(np.log(4) + .25, abs=1e-4)

def test_ball():
    f = torch.randn(6, *LATENT, generator=generator_for("ball"))
    x = f + torch.randn(f.shape, generator=generator_for("far"))
    y = in_ball(x, f, .8)
    assert ((y - f).abs() <= .8 + 1e-6).all() and torch.equal(y[(x - f).abs() < .79], x[(x - f).abs() < .79])
    for i in np.ndindex(2, 2, 3, 3):
        low, high = f[i].item() - .8, f[i].item() + .8
        assert y[i].item() == pytest.approx(min(max(x[i].item(), low), high))
    assert torch.equal(in_ball(x, f, 0), f)

# the judge

@pytest.fixture(scope="module")
def judge(few): return clip_classifier(NANO, "cpu", tuple(few.class_names))

@pytest.mark.parametrize("side", [32, 64, 100])
def test_preparation_is_the_checkpoint_s_own(judge, side):
    coarse = (torch.rand(6, 6, 3, generator=generator_for("im"))*200 + 20).numpy().astype(np.uint8)
    im = Image.fromarray(coarse).resize((side, side), Image.BILINEAR)
    ours = judge.pixels(as_pixels([im]))
    theirs = judge.processor([im], return_tensors="pt").pixel_values
    # it rounds to grey levels in between
    assert theirs.shape == ours.shape and (theirs - ours).abs().max() < 1.5/255/.33

def test_probabilities_are_clip_s(judge, few):
    images = [few.train.read(i) for i in range(4)]
    from transformers import CLIPModel, CLIPTokenizer
    model, tok = CLIPModel.from_pretrained(NANO.clip).eval(), CLIPTokenizer.from_pretrained(NANO.clip)
    ids = tok([f"This is a photo of a {n}" for n in few.class_names], padding=True, return_tensors="pt")
    pixels = judge.processor(images, return_tensors="pt").pixel_values
    with torch.no_grad(): theirs = model(**ids, pixel_values=pixels).logits_per_image.softmax(1)
    ours = judge.log_probs(judge.features(as_pixels(images))).exp()
    # and no guess, which a tenth would be
    assert torch.allclose(ours, theirs, atol=1e-4) and theirs.max() > .3

@pytest.fixture
def scored(monkeypatch):
    "The arguments that `gif_score` gets."
    seen = []
    def noted(*arguments):
        seen.append(arguments)
        return gif_score(*arguments)
    monkeypatch.setattr(module, "gif_score", noted)
    return seen

@pytest.mark.parametrize("target", ["label", "clip"])
def test_equal_pixels_are_judged_alike(few, tmp_path, monkeypatch, scored, target):
    "Decode every latent to the real image: what CLIP says of the copies is then what it says of the image."
    part = dataclasses.replace(PART, target=target)
    studio = studio_of(part, few, tmp_path)
    images = [few.train.read(i) for i in range(4)]
    copies = as_pixels(images).repeat_interleave(3, 0)
    monkeypatch.setattr(module, "_at_once", lambda r: 99)
    monkeypatch.setattr(module, "decode", lambda pipe, f: copies + 0*f.mean((1, 2, 3), keepdim=True))
    imagine(part, studio, studio.rows, torch.zeros(12, *LATENT), images)
    v, log_p, log_p0, kept = scored[0]
    assert torch.allclose(v[:, 0], v[:, 2], atol=1e-5)
    assert torch.allclose(log_p, log_p0[:, None].expand_as(log_p), atol=1e-4)
    assert kept.tolist() == (few.train.labels if target == "label" else log_p0.argmax(1)).tolist()

def test_clip_looks_at_the_untouched_image(few, judge, tmp_path, scored):
    "The class to keep is seen in the image as it is, also where the copies start from one upside down."
    part = dataclasses.replace(PART, target="clip")
    studio = studio_of(part, few, tmp_path)
    images = [few.train.read(i) for i in range(4)]
    upside_down = [im.rotate(180) for im in images]
    imagine(part, studio, studio.rows, torch.zeros(12, *LATENT), upside_down)
    _, _, log_p0, kept = scored[0]
    expected, wrong = (judge.log_probs(judge.features(as_pixels(x))) for x in (images, upside_down))
    assert kept.tolist() == expected.argmax(1).tolist() != wrong.argmax(1).tolist()
    # the entropy is that of the image they start from
    assert torch.allclose(log_p0, wrong, atol=1e-4)

def test_clip_and_label_differ_somewhere(judge):
    s = get_split("nano-fashion", 0)
    x = as_pixels([s.train.read(i) for i in range(0, 250, 5)])
    with torch.no_grad(): seen = judge.log_probs(judge.features(x)).argmax(1).numpy()
    # a guess is right in one of ten; surroundings make it hard for a small CLIP
    assert .3 < (seen == s.train.labels[::5]).mean() < 1

# the step

@pytest.fixture(scope="module")
def latents(few):
    pipe = load_pipeline(NANO, "cpu", None)
    return pipe, encode(pipe, [few.train.read(i) for i in range(4)], 32).repeat_interleave(3, 0)

def scorer(judge, x0, target, m=3):
    with torch.no_grad(): log_p0 = judge.log_probs(judge.features(x0))
    def score(x):
        v = judge.features(x)
        return gif_score(v.unflatten(0, (-1, m)), judge.log_probs(v).unflatten(0, (-1, m)), log_p0, target)
    return score

@pytest.fixture(scope="module")
def hill(few, judge, latents):
    pipe, f = latents
    rows = PART.rows(few, NANO, 0)
    score = scorer(judge, decode(pipe, f[::3]).detach(), torch.tensor(few.train.labels))
    return pipe, f, *first_move(rows, LATENT[0]), score

def one_pass(pipe, f, a, b, score):
    "The gradients themselves, by a single pass through decoder and judge."
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    return torch.autograd.grad(score(decode(pipe, f*(1 + a) + b)).sum(), (a, b))

def test_two_passes_in_parts_give_the_signs_of_one(hill):
    pipe, f, a, b, score = hill
    exact = one_pass(*hill)
    for at_once in (1, 5, 64):
        for s, g in zip(uphill(pipe, f, a, b, lambda x: score(x).sum(), at_once), exact):
            clear = g.abs() > 1e-5*g.abs().max()
            assert s.shape == (12, LATENT[0], 1, 1) and torch.equal(s[clear], g.sign()[clear])
            assert clear.float().mean() > .9

def test_signs_agree_with_differences(hill):
    pipe, f, a, b, score = hill
    up_a, up_b = uphill(pipe, f, a, b, lambda x: score(x).sum(), 64)
    def total(a, b): return score(decode(pipe, moved(f, a, b))).sum().item()
    with torch.no_grad():
        for j, c in ((j, c) for j in (0, 7) for c in range(LATENT[0])):
            e = torch.zeros_like(a)
            e[j, c] = 1e-2
            by_a, by_b = total(a + e, b) - total(a - e, b), total(a, b + e) - total(a, b - e)
            for difference, sign in ((by_a, up_a), (by_b, up_b)):
                if abs(difference) > 1e-3: assert np.sign(difference) == sign[j, c].item()

def test_images_do_not_mix(hill, judge, few):
    pipe, f, a, b, _ = hill
    x0, labels = decode(pipe, f[::3]).detach(), torch.tensor(few.train.labels)
    together = one_pass(*hill)
    for i in range(4):
        part = slice(3*i, 3*i + 3)
        alone = one_pass(pipe, f[part], a[part], b[part], scorer(judge, x0[i:i+1], labels[i:i+1]))
        for t, s in zip(together, alone): assert torch.allclose(t[part], s, rtol=1e-3, atol=1e-5)

def test_half_precision_keeps_the_gradient(hill, monkeypatch):
    pipe, f, a, b, score = hill
    exact, half = one_pass(*hill), copy.copy(pipe)
    half.vae = copy.deepcopy(pipe.vae).half()
    # what is left of it at a pixel of a large image
    signs = uphill(half, f, a, b, lambda x: score(x).sum()*1e-8, 64)
    for s, g in zip(signs, exact): assert (s == g.sign()).float().mean() > .9 and (s != 0).all()

# the images

def test_no_room_to_move_is_sdedit(few, tmp_path):
    plain = generate_pool(SDEdit(strength=.5, num_inference_steps=4, num_copies=2), few, tmp_path/"a")
    for at in ("final", "initial"):
        part = GIF(prompt="class", strength=.5, num_inference_steps=4, num_copies=2, rotation=0., hflip=0.,
                   epsilon=0., perturb_at=at)
        assert distance(generate_pool(part, few, tmp_path/at), plain) <= LEVELS

@pytest.mark.parametrize("at", ["final", "initial"])
def test_against_a_plain_walk(few, judge, tmp_path, at):
    "One image, three copies, with diffusers' own pipeline, a single pass of gradients and clipping by hand."
    part, split = dataclasses.replace(PART, perturb_at=at), some((126,))
    made = generate_pool(part, split, tmp_path)
    rows, pipe = made.rows.to_dict("records"), load_pipeline(NANO, "cpu", None)
    im = split.train.read(0).rotate(rows[0]["rotation"], Image.BICUBIC)
    if rows[0]["flipped"]: im = im.transpose(Image.FLIP_LEFT_RIGHT)
    x0 = as_pixels([im])
    with torch.no_grad(): z = pipe.vae.encode(2*x0 - 1).latent_dist.mode()*pipe.vae.config.scaling_factor
    score = scorer(judge, x0, torch.tensor([rows[0]["label"]]))
    def walk(z):
        how = dict(strength=.5, num_inference_steps=4, guidance_scale=NANO.guidance_scale)
        own = [generator_for(0, r["source_id"], r["copy"], "noise") for r in rows]
        how["output_type"] = "latent"
        return torch.stack([from_latents(pipe, r["prompt"], z[i:i+1], generator=own[i], **how)
                            for i, r in enumerate(rows)])
    def move(f):
        def draw(kind, name):
            own = [generator_for(0, r["source_id"], r["copy"], name) for r in rows]
            return torch.stack([kind(LATENT[0], 1, 1, generator=g) for g in own])
        a, b = draw(torch.rand, "scale"), draw(torch.randn, "shift")
        da, db = one_pass(pipe, f, a, b, score)
        new = f*(1 + a + .1*da.sign()) + b + .1*db.sign()
        return torch.from_numpy(np.clip(new.numpy(), f.numpy() - .8, f.numpy() + .8))
    f = z.repeat(3, 1, 1, 1)
    f = move(walk(f)) if at == "final" else walk(move(f))
    with torch.no_grad(): x = (pipe.vae.decode(f/pipe.vae.config.scaling_factor).sample/2 + .5).clamp(0, 1)
    expected = (x*255).round().permute(0, 2, 3, 1).numpy()
    for i in range(3): assert np.abs(expected[i] - np.asarray(made.image(i)).astype(int)).max() <= LEVELS

@pytest.mark.parametrize("size", [1, 7])
def test_batch_size_does_not_matter(few, pool, tmp_path, size):
    assert distance(generate_pool(PART, few, tmp_path, batch_size=size), pool) <= LEVELS

def test_order_and_shards_do_not_matter(few, pool, tmp_path):
    other = generate_pool(PART, some((225, 126, 30, 0)), tmp_path/"a", batch_size=6)
    assert other.rows.source_id[0] == pool.rows.source_id[9] and distance(other, pool) <= LEVELS
    assert generate_pool(PART, few, tmp_path/"b", batch_size=6, shard=(0, 2)) is None
    assert distance(generate_pool(PART, few, tmp_path/"b", batch_size=6, shard=(1, 2)), pool) <= LEVELS

def test_one_copy(few, tmp_path):
    part = dataclasses.replace(PART, num_copies=1)
    together, alone = (generate_pool(part, few, tmp_path/str(size), batch_size=size) for size in (64, 1))
    assert distance(together, alone) <= LEVELS

def test_copies_and_seeds_differ(few, pool, tmp_path):
    assert len({v.tobytes() for v in by_key(pool).values()}) == 12
    assert distance(generate_pool(PART, few, tmp_path, seed=1), pool) > LEVELS

def test_a_group_is_drawn_whole(few, pool, tmp_path, monkeypatch):
    sizes, draw = [], GIF.draw
    def noted(self, studio, rows):
        sizes.append([(r["source_id"], r["copy"]) for r in rows])
        return draw(self, studio, rows)
    monkeypatch.setattr(GIF, "draw", noted)
    generate_pool(PART, few, tmp_path, batch_size=4)
    assert [len(s) for s in sizes] == [3]*4 and all(len({k for k, _ in s}) == 1 for s in sizes)

# what a pool says of itself

def test_rows():
    whole = get_split("nano-fashion", 0)
    rows = GIF().rows(whole, NANO, 0)
    kinds = {f"{domain} {adjective} {name}".replace("  ", " ")
             for domain in DOMAINS for adjective in ADJECTIVES for name in whole.class_names}
    prompts = {r["prompt"] for r in rows}
    assert prompts <= kinds and len(prompts) > 300 and "an image of trouser" in kinds
    for i in range(0, len(rows), 5):
        assert len({(r["rotation"], r["flipped"]) for r in rows[i:i+5]}) == 1
    turns = np.array([r["rotation"] for r in rows[::5]])
    assert -15 <= turns.min() < -12 and 12 < turns.max() <= 15
    assert .35 < np.mean([r["flipped"] for r in rows[::5]]) < .65
    assert (rows[7]["strength"], rows[7]["steps"]) == (.9, 22)
    assert rows[7]["label_weights"] == [{"label": rows[7]["label"], "weight": 1.}]
    assert not any(r["flipped"] for r in GIF(hflip=0.).rows(whole, NANO, 0))
    assert all(r["rotation"] == 0 for r in GIF(rotation=0.).rows(whole, NANO, 0))

def test_learned_words_are_for_the_generator_only(few, tmp_path, judge):
    words = [f"<{n}>" for n in few.class_names]
    assert all("<" in r["prompt"] for r in GIF().rows(few, NANO, 0, words))
    assert torch.equal(judge.texts, ClipClassifier(NANO, "cpu", tuple(few.class_names)).texts)

def test_turned():
    im = Image.fromarray(np.tile(np.arange(32, dtype=np.uint8)[None, :, None]*8, (32, 1, 3)))
    pixels = np.asarray(im)
    assert np.array_equal(np.asarray(turned(im, 32, 0, False)), pixels)
    assert np.array_equal(np.asarray(turned(im, 32, 0, True)), pixels[:, ::-1])
    assert turned(im, 64, 10, False).size == (64, 64)
    assert np.asarray(turned(im, 32, 15, False))[0, 0].max() == 0

@pytest.mark.parametrize("task, expected", [
    ("nano-fashion", dict(strength=.9, epsilon=.8, prompt="pool", hflip=.5)),
    ("nano-digits-5", dict(strength=.1, hflip=0.)),
    ("nano-scans-25", dict(strength=.3, epsilon=.1, prompt="medical", hflip=0.)),
    ("caltech101", dict(strength=.9, epsilon=4.))])
def test_settings_of_tasks(task, expected):
    m = get_method("gif").at(get_task(task))
    assert m.parts["finetune"] == ("TextualInversion >> DreamBoothLoRA" if "scans" in task else "–")
    assert {k: getattr(m.generate, k) for k in expected} == expected
    assert m.utilize == (GlobalReplacement(p=.5) if "digits" in task else FullConcatenation())

@pytest.mark.parametrize("settings, says", [
    (dict(target="x"), "Unknown target of GIF 'x'"),
    (dict(perturb_at="middle"), "Unknown perturb_at of GIF 'middle'"),
    (dict(strength=(.1, .5)), "GIF: strength is a number; found"),
    (dict(epsilon=-1.), "GIF: epsilon is at least 0; found -1"),
    (dict(strength=0.), r"GIF: strength lies in \(0, 1\]; found 0"),
    (dict(strength=.1, num_inference_steps=5), "0 steps"),
    (dict(num_copies=0), "GIF: num_copies is at least 1; found 0")])
def test_settings_that_cannot_be(settings, says):
    with pytest.raises(DiffDAError, match=says): GIF(**settings)

def test_an_unknown_prompt_rule(few):
    with pytest.raises(DiffDAError, match="Unknown prompt rule 'pol'"): GIF(prompt="pol").rows(few, NANO, 0)

@pytest.mark.gpu
def test_on_a_gpu(few, pool, tmp_path):
    made = generate_pool(PART, few, tmp_path, device="cuda")
    a, b = by_key(made), by_key(pool)
    assert np.mean([np.abs(v - b[k]).mean() for k, v in a.items()]) < 8
