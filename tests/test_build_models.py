"The trainings of the nano world: velocity as in diffusers, going on after a kill, what is shown to whom."
import functools, json, types

import numpy as np, pytest, torch
from diffda import build_models as bm
from diffda.build_data import build_tokenizer, captioned, placed, scene_numbers, to_bytes, to_shapes
from diffda.classifiers import SmallResNet
from diffda.datasets.nano import scene_of
from diffda.nano import JUDGE_OUTPUTS, answers, half_net
from diffda.torch_core import generator_for, resumable, seeded
from diffusers import (DDIMScheduler, DDPMScheduler, LCMScheduler, StableDiffusionPipeline,
                       UNet2DConditionModel)
from made_up import made_up_parts, shipped, write_fashion
from safetensors.torch import load_file
from transformers import CLIPModel

@pytest.fixture(scope="module")
def parts(tmp_path_factory): return made_up_parts(write_fashion(tmp_path_factory.mktemp("sources")))

@pytest.fixture(scope="module")
def told(parts): return captioned(parts)

@pytest.fixture(scope="module")
def tokenizer(told, tmp_path_factory): return build_tokenizer(told[1], tmp_path_factory.mktemp("tokenizer"))

def scenic(n):
    "The first `n` shipped images of clothing in surroundings, uint8 (n, 3, 32, 32)."
    return placed(to_shapes(shipped("fashion")["pool_images"][:n]), [f"some/{i}" for i in range(n)])[0]

@pytest.fixture(scope="module")
def vae():
    with seeded("vae"): return bm.new_vae().eval()

@pytest.fixture(scope="module")
def unet():
    with seeded("unet"): return bm.new_unet((16, 32, 32)).eval()

SIGNALS = bm.new_scheduler().alphas_cumprod

def some_latents(n=2, seed=0): return torch.randn(n, bm.LATENTS, 8, 8, generator=generator_for(seed))

# steps

def test_the_rate_rises_and_falls():
    rates = [bm.cosine(i, 1000, 2.) for i in range(1001)]
    assert rates[0] == pytest.approx(2/100) and max(rates) == pytest.approx(rates[99], rel=1e-3)
    assert rates[500] == pytest.approx(2*.51) and rates[1000] == pytest.approx(2/50)

def test_a_share_of_the_images_is_recoloured():
    x = torch.rand(400, 3, 32, 32, generator=generator_for(0))
    y = bm.recolour(x, generator_for(1))
    changed = (x != y).flatten(1).any(1)
    assert .27 < changed.float().mean() < .43 and 0 <= y.min() and y.max() <= 1
    # all channels are straight lines of the brightness
    grey = x.mean(1).flatten(1)
    some = changed.nonzero()[:5, 0]
    lines = [np.corrcoef(grey[i], y[i, c].flatten())[0, 1] for i in some for c in range(3)]
    assert np.abs(lines).min() > .999

# edits

def correlation(x, y):
    "Correlation of the brightness of each image with its edit, as numpy has it."
    a, b = (v.mean(1).flatten(1).numpy() for v in (x, y))
    return torch.tensor([np.corrcoef(p, q)[0, 1] for p, q in zip(a, b)])

def apart(looks):
    "The least mean difference of two looks."
    looks = list(looks)
    return min((a - b).abs().mean() for i, a in enumerate(looks) for b in looks[:i])

def test_edits_are_nine_looks_that_keep_the_shape():
    x = bm.pixels(scenic(6))
    looks = {name: edit(x, generator_for(0)) for name, edit in bm.EDITS.items()}
    assert list(looks) == ["autumn", "snowy", "watercolor art", "sunset", "rainbow", "aurora", "mosaic",
                           "ukiyo-e", "a sketch with crayon"]
    for name, y in looks.items():
        assert y.shape == x.shape and 0 <= y.min() and y.max() <= 1, name
        assert torch.equal(y, bm.EDITS[name](x, generator_for(0))), name
        assert correlation(x, y).abs().mean() > .2, name
    assert apart(looks.values()) > .05

def test_edits_of_a_flat_image_are_numbers():
    flat = torch.full((1, 3, 32, 32), .5)
    assert all(torch.isfinite(edit(flat, generator_for(0))).all() for edit in bm.EDITS.values())

def test_edit_pairs_belong_together():
    images, names = scenic(30), list(bm.EDITS)
    x, y, style = bm.edit_pairs(images, 10, 3)
    assert x.shape == (10, 3, 32, 32) and y.shape == (30, 3, 32, 32) and x.dtype == y.dtype == torch.uint8
    assert all(len(set(three)) == 3 for three in style.view(10, 3).tolist())
    for i, s in enumerate(style.tolist()):
        # only those without chance can be made again
        if names[s] not in ("autumn", "sunset", "rainbow"): continue
        made = bm.EDITS[names[s]](bm.pixels(x[i//3][None]), None)
        # the edit was made before the source was rounded
        assert (made*255 - y[i]).abs().max() < 12
    assert all(torch.equal(a, b) for a, b in zip(bm.edit_pairs(images, 10, 3), (x, y, style)))

def test_a_widened_network_does_what_it_did(unet):
    wide, g = bm.widened(unet).eval(), generator_for(0)
    z, text = some_latents(), torch.randn(2, 5, 128, generator=g)
    both = torch.cat([z, some_latents(seed=1)], 1)
    assert wide.config.in_channels == 2*bm.LATENTS
    with torch.no_grad():
        assert torch.allclose(wide(both, 7, text).sample, unet(z, 7, text).sample, atol=1e-5)

# velocity

def test_noise_and_velocity_are_those_of_diffusers():
    mean, std, t = some_latents(3), some_latents(3, 1).abs(), torch.tensor([0, 400, 999])
    z, velocity = bm.noised(mean, std, bm.per_image(SIGNALS[t]), generator_for(5))
    g = generator_for(5)
    clean, noise = mean + std*torch.randn(mean.shape, generator=g), torch.randn(mean.shape, generator=g)
    theirs = DDPMScheduler(**bm.SCHEDULE)
    assert torch.allclose(z, theirs.add_noise(clean, noise, t), atol=1e-5)
    assert torch.allclose(velocity, theirs.get_velocity(clean, noise, t), atol=1e-5)

def test_velocity_tells_the_clean_latents_and_the_noise():
    clean, signal = some_latents(3), bm.per_image(torch.tensor([.999, .5, .004]))
    z, velocity = bm.noised(clean, torch.zeros(1), signal, generator_for(5))
    g = generator_for(5)
    torch.randn(clean.shape, generator=g)
    noise = torch.randn(clean.shape, generator=g)
    assert torch.allclose(bm.clean_of(z, velocity, signal), clean, atol=1e-5)
    assert torch.allclose(bm.noise_of(z, velocity, signal), noise, atol=1e-5)

def test_weights_of_the_error_by_hand():
    "SNR 1, 4, 9 and 99: weights 2/2, 5/5, 6/10, 6/100."
    signal, told = bm.per_image(torch.tensor([.5, .8, .9, .99])), torch.full((4, 1, 2, 2), 3.)
    error = bm.weighted_error(told, torch.ones_like(told), signal)
    assert error.item() == pytest.approx(4*(1 + 1 + .6 + .06)/4, rel=1e-4)

def test_the_solver_expects_velocity():
    config = bm.new_scheduler().config
    assert config.prediction_type == "v_prediction" and config.beta_schedule == "scaled_linear"
    assert torch.allclose(SIGNALS, DDPMScheduler(**bm.SCHEDULE).alphas_cumprod)

# few steps

def shrinking(z, t, text):
    "A network that takes three tenths of anything for velocity."
    return types.SimpleNamespace(sample=.3*z)

def test_a_consistency_function_ends_where_it_begins_at_time_zero():
    z = some_latents()
    assert torch.allclose(bm.consistent(shrinking, z, torch.tensor([0, 0]), None, SIGNALS), z)

def test_a_consistency_function_is_that_of_diffusers():
    z, theirs = some_latents(), LCMScheduler.from_config(bm.new_scheduler().config)
    theirs.set_timesteps(4)
    assert theirs.config.prediction_type == "v_prediction"
    for t in theirs.timesteps:
        expected = theirs.step(.3*z, t, z).denoised
        # each step stands for itself
        theirs._step_index = None
        assert torch.allclose(bm.consistent(shrinking, z, t.expand(2), None, SIGNALS), expected, atol=1e-4)

@pytest.mark.parametrize("t", [961, 501, 41])
def test_a_step_is_that_of_ddim(t):
    z, velocity = some_latents(), some_latents(seed=1)
    theirs = DDIMScheduler(**bm.SCHEDULE, clip_sample=False)
    theirs.set_timesteps(25)
    expected = theirs.step(velocity, t, z).prev_sample
    assert torch.allclose(bm.ddim_step(z, velocity, SIGNALS[t], SIGNALS[t - 40]), expected, atol=1e-5)

def telling(z, t, text):
    "A network that tells the mean of its text."
    return types.SimpleNamespace(sample=text.mean((1, 2)).view(-1, 1, 1, 1).expand_as(z))

@pytest.mark.parametrize("guidance, expected", [(0., 1.), (1., 3.), (2.5, 6.)])
def test_guidance_by_hand(guidance, expected):
    z, t, text, none = some_latents(), torch.tensor([5, 5]), torch.full((2, 4, 3), 3.), torch.ones(1, 4, 3)
    assert torch.allclose(bm.guided(telling, z, t, text, none, guidance), torch.full_like(z, expected))

def test_the_target_of_the_last_step_is_clean():
    "From time 19 a step of 40 leads to time 0, where the consistency function changes nothing."
    z, t, text, none = some_latents(), torch.tensor([19, 19]), torch.full((2, 4, 3), 3.), torch.ones(1, 4, 3)
    target = bm.consistency_target(shrinking, telling, z, t, text, none, SIGNALS, guidance=2.5, skip=40)
    assert torch.allclose(target, bm.clean_of(z, torch.full_like(z, 6.), SIGNALS[19]), atol=1e-5)

def test_a_target_is_the_students_view_of_the_teachers_step():
    z, t = some_latents(), torch.tensor([519, 519])
    text, none = torch.full((2, 4, 3), 3.), torch.ones(1, 4, 3)
    target = bm.consistency_target(shrinking, telling, z, t, text, none, SIGNALS, guidance=2.5, skip=40)
    step = bm.ddim_step(z, torch.full_like(z, 6.), SIGNALS[519], SIGNALS[479])
    assert torch.allclose(target, bm.consistent(shrinking, step, t - 40, text, SIGNALS), atol=1e-5)

def test_a_student_begins_as_its_teacher_and_learns_its_lora_alone(unet):
    net, z = bm.student_of(unet, 4, 0), some_latents()
    text = torch.randn(2, 5, 128, generator=generator_for(1))
    with torch.no_grad():
        told = net(z.to(net.device), 7, text.to(net.device)).sample.cpu()
        assert torch.allclose(told, unet.cpu()(z, 7, text).sample, atol=1e-5)
    learned = [name for name, p in net.named_parameters() if p.requires_grad]
    assert learned and all("lora_" in name for name in learned)

def test_every_weight_of_a_lora_arrives(unet, vae, tokenizer, tmp_path):
    "Written from a student, read by diffusers."
    net = bm.student_of(unet, 4, 0)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "lora_B" in name: p.fill_(.25)
    bm.save_lora(net, tmp_path)
    pipe = StableDiffusionPipeline(vae, None, tokenizer, UNet2DConditionModel.from_config(unet.config),
                                   bm.new_scheduler(), None, None, requires_safety_checker=False)
    pipe.load_lora_weights(tmp_path)
    def lora(net): return [v.half().cpu() for name, v in sorted(net.state_dict().items()) if "lora_" in name]
    ours, theirs = lora(net), lora(pipe.unet)
    assert len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs))

# training that is interrupted

def stopped(at):
    "`resumable` that writes each step and is interrupted at step `at`, if that is not None."
    def loop(n, step, state, path, **kw):
        def limited(i):
            if i == at: raise KeyboardInterrupt
            return step(i)
        return resumable(n, limited, state, path, every_s=0, progress=False)
    return loop

def whole_and_stopped(train, tmp_path, monkeypatch, stops):
    "What `train(folder)` returns in one go, and with interruptions at `stops`; each has a folder of its own."
    found = {}
    for name, interruptions in (("whole", ()), ("stopped", stops)):
        folder = tmp_path/name
        folder.mkdir()
        for at in interruptions:
            monkeypatch.setattr(bm, "resumable", stopped(at))
            with pytest.raises(KeyboardInterrupt):
                train(folder)
            assert (folder/"checkpoint.pt").exists() and not list(folder.rglob("*.safetensors"))
        monkeypatch.setattr(bm, "resumable", stopped(None))
        found[name] = train(folder)
    return found

def same_weights(a, b):
    "Whether the only safetensors files below two folders hold the same."
    (a,), (b,) = ([load_file(path) for path in folder.rglob("*.safetensors")] for folder in (a, b))
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())

def assert_resumes(train, tmp_path, monkeypatch, stops):
    found = whole_and_stopped(train, tmp_path, monkeypatch, stops)
    assert found["whole"] == found["stopped"] and same_weights(tmp_path/"whole", tmp_path/"stopped")

def made_up_text_states(encoder, tokenizer, texts):
    "Two states, the second for all captions."
    return torch.randn(2, 5, 128, generator=generator_for(0)), torch.ones(len(texts), dtype=torch.long)

@pytest.mark.parametrize("what", ["generator", "editor", "lcm"])
def test_interrupted_training_of_a_denoiser_resumes(what, vae, unet, tmp_path, monkeypatch):
    monkeypatch.setattr(bm, "text_states", made_up_text_states)
    images, kinds, few = scenic(12), torch.arange(12) % 3, dict(steps=3, batch=2)
    train = {
        "generator": lambda f: bm.train_unet(images, ["a photo"]*12, kinds, vae, None, None, f, **few),
        "editor": lambda f: bm.train_editor(images, unet, vae, None, None, f, **few, sources=6),
        "lcm": lambda f: bm.train_lcm(images, ["a photo"]*12, unet, vae, None, None, f, **few, sources=6),
    }[what]
    assert_resumes(train, tmp_path, monkeypatch, (1, 2))

def test_interrupted_autoencoder_training_resumes(tmp_path, monkeypatch):
    train = functools.partial(bm.train_vae, scenic(40), steps=4, batch=4)
    assert_resumes(train, tmp_path, monkeypatch, (1, 3))
    def scale(name): return json.loads((tmp_path/name/"vae"/"config.json").read_text())["scaling_factor"]
    assert scale("whole") == scale("stopped") != .18215

def test_interrupted_training_of_the_encoders_resumes(told, tokenizer, tmp_path, monkeypatch):
    train = functools.partial(bm.train_clip, *told[:2], tokenizer, steps=3, batch=8)
    assert_resumes(train, tmp_path, monkeypatch, (1, 2))

@pytest.fixture(scope="module")
def clip(tokenizer, tmp_path_factory):
    "The folder of an untrained CLIP model."
    folder = tmp_path_factory.mktemp("clip")
    with seeded("clip"):
        bm.new_clip(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

def test_interrupted_training_of_the_eyes_resumes(told, clip, tmp_path, monkeypatch):
    train = functools.partial(bm.train_eyes, told[0], told[2], clip, steps=3, batch=8)
    assert_resumes(train, tmp_path, monkeypatch, (1, 2))

def test_only_the_image_tower_gets_eyes(told, clip, tmp_path):
    bm.train_eyes(told[0], told[2], clip, tmp_path, steps=2, batch=8)
    before = load_file(clip/"model.safetensors")
    after = CLIPModel.from_pretrained(tmp_path/"clip").state_dict()
    eyes = ("vision_model", "visual_projection")
    assert any(name.startswith("text_model") for name in before) and "logit_scale" in before
    for name, v in before.items():
        if name.endswith("position_ids"): continue
        # keys get no gradient from their bias
        if name.endswith("k_proj.bias"): continue
        assert torch.equal(v, after[name]) != name.startswith(eyes), name

def test_eyes_learn_the_scenes(clip, tmp_path, monkeypatch):
    "Thirty images by heart: the loss falls."
    monkeypatch.setattr(bm, "resumable", stopped(None))
    x = scenic(30)
    numbers = torch.tensor([[0, *scene_numbers(scene_of(f"some/{i}"))] for i in range(30)])
    def loss(n):
        (tmp_path/str(n)).mkdir()
        return bm.train_eyes(x, numbers, clip, tmp_path/str(n), steps=n, batch=30)["loss"]
    assert loss(12) < loss(1) - .05

def test_interrupted_training_of_the_judge_resumes(parts, tmp_path, monkeypatch):
    train = functools.partial(bm.train_judge, parts, steps=3, batch=16)
    assert_resumes(train, tmp_path, monkeypatch, (1, 2))

def test_what_is_kept_is_made_once(tmp_path):
    made = []
    def make():
        made.append(1)
        return torch.arange(3), torch.ones(2)
    for _ in range(2):
        a, b = bm.kept(tmp_path/"x.pt", make)
        assert a.tolist() == [0, 1, 2] and b.tolist() == [1, 1]
    assert made == [1]

# latents and texts

def test_centred_latents_are_standard_and_reconstruct_the_same():
    with seeded("vae"):
        vae = bm.new_vae().eval()
        # latents far from the middle
        with torch.no_grad():
            for p in vae.quant_conv.parameters():
                p.add_(torch.randn(p.shape))
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (40, 3, 32, 32), dtype=np.uint8))
    rgb = bm.pixels(x)*2 - 1
    with torch.no_grad():
        z = vae.encode(rgb).latent_dist.mean
        before = vae.decode(z).sample
        assert z.mean((0, 2, 3)).abs().max() > .05 and z.shape == (40, bm.LATENTS, 8, 8)
        bm.centre(vae, x)
        latents = vae.encode(rgb).latent_dist.mean
        after = vae.decode(latents).sample
    assert torch.allclose(before, after, atol=1e-4)
    assert torch.allclose(latents, z - z.mean((0, 2, 3))[:, None, None], atol=1e-4)
    scaled = latents*vae.config.scaling_factor
    assert scaled.mean((0, 2, 3)).abs().max() < 1e-3 and abs(scaled.std().item() - 1) < 1e-3
    mean, _ = bm.latents_of(vae, x)
    assert torch.allclose(mean, scaled, atol=1e-4)

def test_states_of_texts_are_those_of_the_encoder(tokenizer, clip):
    model, texts = CLIPModel.from_pretrained(clip), ["a red bag", "", "a dress", "a red bag"]
    states, which = bm.text_states(model.text_model, tokenizer, texts)
    assert which.tolist() == [2, 0, 1, 2] and states.shape == (3, 32, 128)
    with torch.no_grad():
        expected = model.text_model(bm.tokens(tokenizer, texts))[0]
    assert torch.allclose(states[which], expected, atol=1e-5)

def test_the_processor_prepares_pixels_as_the_training_does():
    x = scenic(1)
    theirs = bm.clip_processor()(x, return_tensors="pt").pixel_values
    assert torch.allclose(theirs, bm.clip_pixels(bm.pixels(x)), atol=1e-5)

def test_the_loss_of_attributes_by_hand():
    "What is unknown counts nothing."
    logits = {name: torch.zeros(2, k) for name, k in zip(bm.ATTRIBUTES, (30, 8, 8, 8))}
    logits["class"][:, 3] = 5.
    truth = torch.tensor([[3, 1, 2, 0], [3, -1, -1, 7]])
    right = np.log(1 + 29*np.exp(-5.))
    assert bm.attribute_loss(logits, truth).item() == pytest.approx((right + 3*np.log(8))/4, rel=1e-5)

# what the networks are shown

def batches(train, monkeypatch):
    "(network, `batch_at`) that a training of a denoiser would begin with."
    seen = []
    monkeypatch.setattr(bm, "train_denoiser", lambda net, batch_at, *rest: seen.append((net, batch_at)))
    monkeypatch.setattr(bm, "text_states", made_up_text_states)
    train()
    return seen[0]

def shares(text):
    "Share of the text states that are the first, of no text."
    return (text == made_up_text_states(0, 0, "x")[0][0]).all(2).all(1).float()

def test_the_generators_input(vae, tmp_path, monkeypatch):
    images = scenic(12)
    train = functools.partial(bm.train_unet, images, ["a photo"]*12, torch.arange(12) % 3, vae, None, None,
                              tmp_path, batch=400)
    net, batch_at = batches(train, monkeypatch)
    z, t, text, velocity = batch_at(0)
    assert z.shape == velocity.shape == (400, bm.LATENTS, 8, 8)
    assert net.config.in_channels == net.config.out_channels == bm.LATENTS
    assert .05 < shares(text).mean() < .15 and t.min() < 20 and t.max() > 980
    # what is left without the noise are latents of the images
    clean, (mean, std) = bm.clean_of(z, velocity, bm.per_image(SIGNALS[t])), bm.latents_of(vae, images)
    near = ((clean[:, None] - mean)/std).square().mean((2, 3, 4)).amin(1)
    assert (near - 1).abs().max() < .5

def test_the_editors_input(vae, unet, tmp_path, monkeypatch):
    "Noisy latents beside those of the source, a twentieth each without image, without text, without both."
    train = functools.partial(bm.train_editor, scenic(12), unet, vae, None, None, tmp_path, batch=2000,
                              sources=6)
    net, batch_at = batches(train, monkeypatch)
    z, _, text, velocity = batch_at(0)
    source, *_ = torch.load(tmp_path/"latents.pt", weights_only=True)
    assert z.shape == (2000, 2*bm.LATENTS, 8, 8) and velocity.shape == (2000, bm.LATENTS, 8, 8)
    assert net.config.in_channels == 2*bm.LATENTS
    image, untold = z[:, bm.LATENTS:], shares(text) == 1
    blind = (image == 0).flatten(1).all(1)
    for which in (blind & untold, blind & ~untold, ~blind & untold):
        assert .03 < which.float().mean() < .07
    assert (image[~blind][:, None] == source).flatten(2).all(2).any(1).all()

# classifiers and judge

def test_shown_to_the_classifiers(parts):
    x, y, test, truth = bm.net_data("nano-known", parts)
    # clothing in three surroundings, digits in eighteen
    assert len(x) == len(y) == 3*100 + 18*50 and len(test) == len(truth) == 50 + 500
    assert set(y.tolist()) == set(truth.tolist()) == set(range(15))
    x, y, test, truth = bm.net_data("nano-fashion", parts)
    assert x.shape == (300, 3, 32, 32) and x.dtype == torch.uint8 and np.bincount(truth).tolist() == [5]*10
    assert np.array_equal(y, np.tile(parts["fashion"]["pretrain"][1], 3))
    assert not torch.equal(x[:100], x[100:200])

def test_a_saved_net_is_opened_in_single_precision(tmp_path):
    with seeded("net"):
        net = bm.new_classifier("small-resnet", 3)
    bm.save_net(net, tmp_path/"net.safetensors")
    opened = half_net(tmp_path/"net.safetensors", 3)
    assert not opened.training and {p.dtype for p in opened.parameters()} == {torch.float32}
    weights = opened.state_dict()
    for name, v in net.state_dict().items():
        assert torch.allclose(v, weights[name], atol=1e-3), name

@pytest.fixture(scope="module")
def shapes(parts): return bm.all_shapes(parts)

def test_all_shapes_have_their_labels(parts, shapes):
    "Of the made-up clothing the place of the square tells the class; of the rest the number in the source."
    x, y = shapes["fashion"]
    assert len(x) == len(y) == 3150
    assert (x[torch.arange(3150), 0, 2*torch.from_numpy(y) + 3, 12]*255 == 200).all()
    for name, n in (("digits", 1100), ("scans", 950)):
        x, y = shapes[name]
        assert len(x) == n and np.bincount(y).tolist() == [n//10]*10

def test_digits_keep_their_names_in_all_shapes(parts, shapes):
    y, at = shapes["digits"][1], 0
    for part, (_, labels, _) in parts["digits"].items():
        expected = labels + (5 if part in ("pool", "test") else 0)
        assert np.array_equal(y[at:at + len(labels)], expected)
        at += len(labels)

def test_the_diet_of_the_judge():
    assert sum(row[1] for row in bm.JUDGE_DIET.values()) == pytest.approx(1) and len(bm.JUDGED) == 30

def test_shares_of_a_batch_of_the_judge(shapes):
    x, truth = bm.judge_batch(shapes, 200, generator_for(0))
    assert x.shape == (200, 3, 32, 32) and x.dtype == torch.uint8 and truth.shape == (200, 4)
    kinds = truth[:, 0]//10
    assert [(kinds == k).sum().item() for k in range(3)] == [100, 44 + 24, 32]
    # scans have no scene, and a third of the others are changed
    assert (truth[kinds == 2, 1:] == -1).all()
    assert .2 < (truth[kinds < 2, 1] == -1).float().mean() < .45
    assert ((truth[:, 1:] == -1).any(1) == (truth[:, 1:] == -1).all(1)).all()

def test_the_judge_is_told_the_truth(shapes, monkeypatch):
    "Of unchanged images the numbers are those of the scenes that were drawn, and the colour can be seen."
    texts, placed = [], bm.placed
    def noted(shapes, its_texts):
        texts.extend(its_texts)
        return placed(shapes, its_texts)
    monkeypatch.setattr(bm, "placed", noted)
    x, truth = bm.judge_batch(shapes, 100, generator_for(1))
    assert len(texts) == len(set(texts)) == 84
    for text, row in zip(texts, truth[:84, 1:].tolist()):
        assert row in (scene_numbers(scene_of(text)), [-1]*3)

def test_looks_change_the_marked_images_alone():
    x = scenic(60)
    y, changed = bm.in_looks(x, generator_for(0), share=.5)
    assert .3 < changed.float().mean() < .7 and y.dtype == torch.uint8
    assert torch.equal(x[~changed], y[~changed]) and (x != y)[changed].flatten(1).any(1).float().mean() > .9

def test_a_judge_can_be_opened_and_asked(parts, tmp_path):
    found = bm.train_judge(parts, tmp_path, steps=2, batch=16)
    assert set(found["accuracy"]) == {*bm.JUDGE_DIET, "colour", "pattern", "ground"}
    net = half_net(tmp_path/"nano-judge.safetensors", JUDGE_OUTPUTS)
    assert isinstance(net, SmallResNet) and set(answers(net, scenic(2))) == set(bm.ATTRIBUTES)

def test_accuracy_of_the_judge_by_hand(parts, monkeypatch):
    "One that always says the last class is right for a tenth, or a fifth of the five digits."
    def always(net, x):
        told = {name: torch.zeros(len(x), k) for name, (_, k) in bm.JUDGE_HEADS.items()}
        told["class"] += torch.arange(30.)
        return told
    monkeypatch.setattr(bm, "answers", always)
    found = bm.judge_accuracy(None, parts)
    assert [found[name] for name in bm.JUDGE_DIET] == [10., 20., 20., 10., 10.]

def test_bytes_and_pixels_agree():
    x = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_bytes(bm.pixels(x)), x)
