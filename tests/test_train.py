"Training and its networks, checked against plain PyTorch, torchvision and scikit-learn."
import dataclasses, errno, math, os, subprocess, types

import numpy as np, pytest, torch, torchvision
from PIL import Image
from safetensors.torch import save_file
from sklearn.metrics import balanced_accuracy_score, recall_score, top_k_accuracy_score
from torchvision.transforms import v2

from diffda import torch_core, train
from diffda.classifiers import (IMAGENET, NANO_NETS, SMALL_NETS, SmallResNet, initialisations, last_layer,
                                load_half, nano_weights, new_classifier, trained, weights_file, weights_key)
from diffda.core import DiffDAError
from diffda.data import NANO_TRAINING, get_split
from diffda.torch_core import generator_for, seeded
from diffda.train import (Stacked, accuracies, augment, augmented_batch, batches, crop_flip, environment, fit,
                          look_at, mean_class, new_array, normalise, own_commit, predict, smooth,
                          steps_per_epoch, summary, turn, write_array)
from diffda.utilize import FullConcatenation, LocalReplacement, TwoPhase, get_strategy

PLAIN = dataclasses.replace(NANO_TRAINING, epochs=3, batch_size=8, pad=0, lr=.05, label_smoothing=.1,
                            evaluations=0)
K = 3

def images(n, size=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 3, size, size), dtype=np.uint8)

def small(seed=0):
    with seeded(seed, "test net"): return SmallResNet(K)

def soft(n, k=K, seed=0):
    weights = np.random.default_rng(seed).random((n, k)).astype(np.float32)
    return weights/weights.sum(1, keepdims=True)

def same_weights(one, two):
    ours, others = one.state_dict(), two.state_dict()
    return ours.keys() == others.keys() and all(torch.equal(ours[k], others[k]) for k in ours)

@pytest.fixture
def untouched():
    "The global random state of torch is the same after the test as before."
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before)

# accuracies

@pytest.mark.parametrize("k", [3, 10])
def test_accuracies_are_scikit_learns(k):
    rng = np.random.default_rng(k)
    scores, y = rng.normal(size=(200, k)), rng.integers(0, k, 200)
    scores[np.arange(200), y] += .7
    got = accuracies(torch.from_numpy(scores).float(), y, k)
    def top(n): return 100*top_k_accuracy_score(y, scores, k=n, labels=range(k))
    assert got["top1"] == pytest.approx(top(1), abs=1e-4)
    assert got["top5"] == pytest.approx(top(5) if k > 5 else 100, abs=1e-4)
    expected = 100*recall_score(y, scores.argmax(1), average=None)
    assert got["per_class"] == pytest.approx(expected.tolist(), abs=1e-4)

def test_a_class_without_images_has_no_accuracy():
    assert accuracies(torch.eye(3)[[0, 1, 1]], [0, 1, 0], 3)["per_class"] == [50, 100, None]

def test_mean_class_is_scikit_learns_balanced_accuracy():
    rng = np.random.default_rng(4)
    scores, y = rng.normal(size=(200, 5)), rng.choice(5, 200, p=[.5, .2, .15, .1, .05])
    got = accuracies(torch.from_numpy(scores).float(), y, 5)
    expected = pytest.approx(100*balanced_accuracy_score(y, scores.argmax(1)), abs=1e-4)
    assert mean_class(got["per_class"]) == expected != got["top1"]
    assert mean_class([100., None, 0.]) == 50

def test_prediction_is_torchvisions_centre_crop_in_evaluation_mode():
    mean, std = (.1, .2, .3), (.4, .5, .6)
    training = dataclasses.replace(PLAIN, crop=28, mean=mean, std=std)
    x, net = torch.from_numpy(images(203)), small()
    plain = v2.Compose([v2.CenterCrop(28), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])
    net.eval()
    with torch.no_grad(): expected = net(plain(x))
    net.train()
    got = predict(net, x, training, "cpu")
    assert torch.allclose(got, expected, atol=1e-5) and not net.training

# what a batch is made of

def possible_crops(image, size, pad):
    "{bytes of a crop: (top, left, flipped)} for all crops of side `size` of a uint8 image (3, s, s)."
    padded, found = np.pad(image, ((0, 0), (pad, pad), (pad, pad))), {}
    for top in range(2*pad + 1):
        for left in range(2*pad + 1):
            crop = padded[:, top:top+size, left:left+size]
            found[crop.tobytes()] = (top, left, 0)
            found[crop[:, :, ::-1].tobytes()] = (top, left, 1)
    return found

def test_crops_are_all_possible_crops_and_flips(untouched):
    x = torch.from_numpy(images(1, 6)).expand(3000, -1, -1, -1)
    possible = possible_crops(x[0].numpy(), 6, 1)
    crops = crop_flip(x, 6, 1, .5, generator_for(0)).numpy()
    # a KeyError would be a crop that cannot be
    seen = np.array([possible[crop.tobytes()] for crop in crops])
    counts = np.unique(seen, axis=0, return_counts=True)[1]
    # uniform: chi-square with 17 degrees of freedom
    assert len(counts) == 18 and ((counts - 3000/18)**2/(3000/18)).sum() < 45
    never = crop_flip(x, 6, 1, 0., generator_for(0)).numpy()
    assert {possible[crop.tobytes()][2] for crop in never} == {0}

def test_crops_do_not_share_a_draw_between_images():
    x = torch.from_numpy(images(1)).expand(64, -1, -1, -1)
    assert len({crop.numpy().tobytes() for crop in crop_flip(x, 28, 2, .5, generator_for(1))}) > 40

@pytest.mark.parametrize("eps", [0., .1, .3])
def test_smoothing(eps):
    q = torch.from_numpy(soft(5, 4))
    got = smooth(q, eps)
    expected = torch.tensor([[(1 - eps)*v + eps*(1 - v)/3 for v in row] for row in q.tolist()])
    assert torch.allclose(got, expected, atol=1e-6)
    assert torch.allclose(got.sum(1), torch.ones(5), atol=1e-6)
    hard = smooth(torch.eye(4), eps)
    assert torch.allclose(hard.diagonal(), torch.full((4,), 1 - eps))
    assert hard[0, 1].item() == pytest.approx(eps/3)

@pytest.mark.parametrize("kind", ["standard", "mixup", "cutmix", "randaugment", "autoaugment"])
def test_a_batch_depends_on_its_parts_only(untouched, kind):
    x, q = torch.from_numpy(images(8)), torch.from_numpy(soft(8))
    training = dataclasses.replace(NANO_TRAINING, hflip=.5, label_smoothing=.1)
    def batch(*parts): return augment(x.clone(), q, training, kind, parts, mix_prob=1.)
    one, two = batch(0, 3, 5), batch(0, 3, 5)
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    assert torch.allclose(one[1].sum(1), torch.ones(8), atol=1e-5)
    assert one[0].shape == (8, 3, 32, 32) and one[0].dtype == torch.float32
    for other in ((1, 3, 5), (0, 4, 5), (0, 3, 6)):
        assert not torch.equal(one[0], batch(*other)[0])

SHARP = dataclasses.replace(PLAIN, label_smoothing=0.)

def test_mixup_mixes_images_and_labels_by_the_same_share():
    x, q = torch.from_numpy(images(6)), torch.eye(6)
    got, labels = augment(x, q, SHARP, "mixup", (0,), mix_prob=1.)
    share, plain = labels[0, 0], normalise(x, PLAIN)
    assert 0 < share < 1 and torch.allclose(labels, share*q + (1 - share)*q.roll(1, 0), atol=1e-6)
    assert torch.allclose(got, share*plain + (1 - share)*plain.roll(1, 0), atol=1e-5)

def test_cutmix_weighs_labels_by_area():
    x, q = torch.from_numpy(images(6)), torch.eye(6)
    got, labels = augment(x, q, SHARP, "cutmix", (3,), mix_prob=1.)
    plain = normalise(x, PLAIN)
    own = (got == plain).all(1)
    other = (got == plain.roll(1, 0)).all(1) & ~own
    # each pixel is of the one or of the other
    assert (own | other).all()
    share = other.float().mean((1, 2))[:, None]
    assert 0 < share[0] < 1 and torch.allclose(labels, (1 - share)*q + share*q.roll(1, 0), atol=2e-3)

def test_mixing_concerns_the_stated_share_of_batches():
    x, q = torch.from_numpy(images(2, 8)), torch.eye(2)
    training = dataclasses.replace(SHARP, crop=8)
    for prob in (0., .5, 1.):
        labels = [augment(x, q, training, "mixup", (0, i), mix_prob=prob)[1] for i in range(200)]
        mixed = np.mean([not torch.equal(found, q) for found in labels])
        assert abs(mixed - prob) < .15

def test_randaugment_is_torchvisions():
    x = torch.from_numpy(images(4))
    training = dataclasses.replace(SHARP, hflip=.5)
    got, q = augment(x, torch.eye(4), training, "randaugment", (7,))
    with seeded(7, "randaugment"):
        expected = torch.stack([v2.RandAugment(num_ops=2, magnitude=9)(image) for image in x])
    assert torch.equal(got, normalise(expected, training)) and torch.equal(q, torch.eye(4))
    assert not torch.equal(expected, x)

POLICIES = [(32, v2.AutoAugmentPolicy.CIFAR10), (40, v2.AutoAugmentPolicy.IMAGENET)]

@pytest.mark.parametrize("size, policy", POLICIES)
def test_autoaugment_is_torchvisions_and_keeps_the_flip(size, policy):
    x = torch.from_numpy(images(6, size))
    training = dataclasses.replace(SHARP, resize=size, crop=size, hflip=1.)
    got, q = augment(x, torch.eye(6), training, "autoaugment", (7,))
    with seeded(7, "autoaugment"):
        expected = torch.stack([v2.AutoAugment(policy)(image) for image in x])
    assert torch.equal(got, normalise(expected.flip(-1), training)) and torch.equal(q, torch.eye(6))
    assert not torch.equal(expected, x)

@pytest.mark.parametrize("more", [{}, {"rotation": 0.}, {"rotation": 1e-9}, {"vflip": 0.}])
def test_no_rotation_and_no_turn_leave_a_batch_as_it_was(untouched, more):
    "Crops and flips are drawn as ever."
    x, q = torch.from_numpy(images(8)), torch.eye(8)
    crops = crop_flip(x, 32, 2, .5, generator_for(5, "crop"))
    training = dataclasses.replace(SHARP, pad=2, hflip=.5, **more)
    assert torch.equal(augment(x, q, training, "standard", (5,))[0], normalise(crops, training))

def test_rotation_and_turn(untouched):
    x = torch.from_numpy(images(400, 8))
    angles = 30*(2*torch.rand(400, generator=generator_for(5, "rotation"), dtype=torch.float64) - 1)
    got = turn(x, 0., 30., (5,))
    for i in (0, 1, 399):
        image = Image.fromarray(x[i].permute(1, 2, 0).numpy())
        assert np.array_equal(got[i].permute(1, 2, 0), image.rotate(angles[i].item(), Image.NEAREST)), i
    assert angles.min() < -28 and angles.max() > 28 and got.dtype == torch.uint8

    turned = turn(x, .5, 0., (5,))
    upside = (turned == x.flip(2)).flatten(1).all(1)
    assert 150 < upside.sum() < 250 and torch.equal(turned[~upside], x[~upside])

def test_randaugment_replaces_flips_and_rotation():
    x = torch.from_numpy(images(4))
    turned = dataclasses.replace(SHARP, hflip=1., vflip=1., rotation=40.)
    one, two = (augment(x, torch.eye(4), training, "randaugment", (7,))[0] for training in (turned, SHARP))
    assert torch.equal(one, two)

def with_settings(split, **more):
    "The split with other settings of its training, `interpolation` among them."
    settings = {**vars(split.task.training), "interpolation": "bilinear", **more}
    split.task = dataclasses.replace(split.task, training=types.SimpleNamespace(**settings))
    return split

def test_augmented_batch_shows_the_images():
    split = with_settings(get_split("nano-scans-5", 0), pad=0)
    x, q = augmented_batch(split, [0, 7])
    shown = x[1].permute(1, 2, 0).numpy()*255
    assert np.abs(shown - np.asarray(split.train.read(7))).max() < .1
    assert q.argmax(1).tolist() == split.train.labels[[0, 7]].tolist()

@pytest.mark.parametrize("name, how", [("bilinear", Image.BILINEAR), ("bicubic", Image.BICUBIC)])
def test_augmented_batch_resizes_as_the_training_says(name, how):
    split = with_settings(get_split("nano-scans-5", 0), pad=0, resize=20, crop=20, interpolation=name)
    x, _ = augmented_batch(split, [7])
    expected = np.asarray(split.train.read(7).resize((20, 20), how))
    assert np.abs(x[0].permute(1, 2, 0).numpy()*255 - expected).max() < .1

# classifiers

DOCUMENTED = [("resnet50", 25_557_032, 2048), ("mobilenet_v3_large", 5_483_032, 1280),
              ("vit_b_16", 86_567_656, 768), ("efficientnet_b0", 5_288_548, 1280),
              ("efficientnet_b3", 12_233_232, 1536), ("wide_resnet50_2", 68_883_240, 2048)]

def count(weights): return sum(w.numel() for w in weights)

@pytest.mark.parametrize("name, params, features", DOCUMENTED)
def test_torchvision_nets_get_a_new_head(name, params, features):
    "Parameters as torchvision's documentation counts them for 1000 classes; a probe trains the head alone."
    with torch.device("meta"):
        net = new_classifier(name, 7)
        assert net(torch.empty(2, 3, 224, 224)).shape == (2, 7)
    head = (features + 1)*7
    assert count(net.parameters()) == params - (features + 1)*1000 + head
    assert count(trained(net, "last")) == head and last_layer(net)[1].out_features == 7

@pytest.fixture
def asked(monkeypatch):
    "The networks and weights that torchvision is asked for; none are loaded."
    found, original = [], torchvision.models.get_model
    def get_model(name, weights=None):
        found.append((name, weights))
        return original(name)
    monkeypatch.setattr(torchvision.models, "get_model", get_model)
    return found

@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v3_large", "vit_b_16"])
def test_imagenet_weights_are_asked_for(asked, name):
    with torch.device("meta"):
        new_classifier(name, 7, "imagenet")
        new_classifier(name, 7, "scratch")
    assert asked == [(name, "IMAGENET1K_V1"), (name, None)]

def test_second_imagenet_weights(asked):
    with torch.device("meta"): new_classifier("resnet50", 7, "imagenet-v2")
    assert asked == [("resnet50", "IMAGENET1K_V2")]
    known = torchvision.models.ResNet50_Weights
    assert known.IMAGENET1K_V2 is known.DEFAULT
    with pytest.raises(DiffDAError, match="initialisation of vit_b_16 'imagenet-v2': did you mean imagenet"):
        new_classifier("vit_b_16", 7, "imagenet-v2")

def test_weights_that_cannot_be_had(monkeypatch):
    def offline(name, weights=None): raise OSError("no route to host\nand more")
    monkeypatch.setattr(torchvision.models, "get_model", offline)
    file = weights_file("resnet50")
    with pytest.raises(DiffDAError) as e: new_classifier("resnet50", 7, "imagenet")
    assert str(e.value) == ("The ImageNet weights of resnet50 cannot be loaded (no route to host); "
                            f"check the connection, or put {file.name} into {file.parent}.")

def test_small_net(untouched):
    one, same, other = (new_classifier("small-resnet", 5, seed=seed) for seed in (0, 0, 1))
    assert one.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 5)
    assert same_weights(one, same) and not torch.equal(one.fc.weight, other.fc.weight)

@pytest.mark.parametrize("init, k", NANO_NETS.items())
def test_nano_weights_go_everywhere_but_into_the_head(init, k):
    stored, scratch = nano_weights(init), new_classifier("small-resnet", 5).state_dict()
    found = new_classifier("small-resnet", 5, init).state_dict()
    assert set(stored) == set(found) and stored["fc.weight"].shape[0] == k
    for name, values in found.items():
        assert torch.equal(values, scratch[name] if name.startswith("fc.") else stored[name]), name
        assert values.dtype != torch.float16

def test_half_precision_is_loaded_as_single(tmp_path):
    kept = {"a": torch.tensor([.1, 2.]).half(), "b": torch.tensor([.1]), "n": torch.tensor(3)}
    save_file(kept, tmp_path/"x.safetensors")
    found = load_half(tmp_path/"x.safetensors")
    assert [found[name].dtype for name in "abn"] == [torch.float32, torch.float32, torch.int64]
    assert all(torch.equal(found[name], kept[name].to(found[name].dtype)) for name in kept)
    with pytest.raises(DiffDAError, match="y.safetensors is missing: the installation is incomplete"):
        load_half(tmp_path/"y.safetensors")

def test_another_nano_world(tmp_path, monkeypatch):
    "The variable is read when a network is asked for."
    before, first = weights_key("nano-fashion"), nano_weights("nano-fashion")
    (tmp_path/"classifiers").mkdir()
    moved = {name: values + 1 for name, values in first.items()}
    save_file(moved, tmp_path/"classifiers"/"nano-fashion.safetensors")
    monkeypatch.setenv("DIFFDA_NANO", str(tmp_path))
    assert torch.equal(nano_weights("nano-fashion")["fc.bias"], first["fc.bias"] + 1)
    assert weights_key("nano-fashion") != before and weights_key("scratch") is None

UNKNOWN = [("resnet5", "scratch", "Unknown classifier 'resnet5': did you mean resnet50"),
           ("resnet50", "nano-fashion", "initialisation of resnet50"),
           ("small-resnet", "imagenet", "initialisation of small-resnet"),
           ("wrn-28-2", "imagenet", "initialisation of wrn-28-2 'imagenet': known: scratch"),
           ("wrn-28-10", "imagenet", "initialisation of wrn-28-10 'imagenet': known: scratch")]

@pytest.mark.parametrize("name, init, says", UNKNOWN)
def test_unknown_names(name, init, says):
    with pytest.raises(DiffDAError, match=says): new_classifier(name, 5, init)

def test_initialisations():
    assert initialisations("small-resnet") == ["scratch", *NANO_NETS]
    assert initialisations("resnet50") == ["scratch", *IMAGENET]
    assert initialisations("wrn-28-2") == ["scratch"]

@pytest.mark.parametrize("name, params", [("wrn-28-2", 1_467_610), ("wrn-28-10", 36_479_194)])
def test_wide_residual_networks(name, params):
    "Numbers of parameters as published for ten classes; four blocks at each of 32x32, 16x16 and 8x8."
    with torch.device("meta"):
        net, x = new_classifier(name, 10), torch.empty(2, 3, 32, 32)
        assert net(x).shape == (2, 10) and net.blocks(net.stem(x)).shape[2:] == (8, 8)
    assert count(net.parameters()) == params
    convolutions = [layer for layer in net.modules() if isinstance(layer, torch.nn.Conv2d)]
    assert sum(layer.kernel_size == (3, 3) for layer in convolutions) == 25
    assert name in SMALL_NETS

# arrays

RESIZES = [({}, Image.BILINEAR), ({"interpolation": "bicubic"}, Image.BICUBIC)]

@pytest.mark.parametrize("how, filter", RESIZES)
def test_write_array(tmp_path, how, filter):
    pictures = [Image.fromarray(images(1, 20, i)[0].transpose(1, 2, 0)) for i in range(3)]
    got = write_array(iter(pictures), 3, 12, tmp_path/"x.npy", **how)
    expected = np.stack([np.asarray(picture.resize((12, 12), filter)) for picture in pictures])
    assert got.dtype == np.uint8 and np.array_equal(got, expected.transpose(0, 3, 1, 2))
    # there already: not decoded again
    assert np.array_equal(write_array(iter([]), 3, 12, tmp_path/"x.npy"), got)
    with pytest.raises(DiffDAError, match="Unknown interpolation 'bicubik': did you mean bicubic"):
        write_array(iter(pictures), 3, 12, tmp_path/"y.npy", interpolation="bicubik")

def test_write_array_leaves_nothing_half_done(tmp_path):
    def broken():
        yield Image.new("RGB", (12, 12))
        raise DiffDAError("damaged")
    with pytest.raises(DiffDAError, match="damaged"): write_array(broken(), 2, 12, tmp_path/"x.npy")
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize("shape", [(3, 3, 12, 12), (0, 3, 12, 12), (700, 3, 32, 32)])
@pytest.mark.parametrize("has_fallocate", [True, False])
def test_an_array_is_a_plain_npy_file_with_all_its_space(tmp_path, monkeypatch, shape, has_fallocate):
    if not has_fallocate: monkeypatch.delattr(os, "posix_fallocate")
    array = new_array(tmp_path/"x.npy", shape)
    assert array.shape == shape and array.dtype == np.uint8 and not array.any()
    assert (tmp_path/"x.npy").stat().st_blocks*512 >= array.nbytes
    np.save(tmp_path/"plain.npy", np.zeros(shape, np.uint8))
    assert (tmp_path/"x.npy").read_bytes() == (tmp_path/"plain.npy").read_bytes()

def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    "Before an image is decoded; a mapped file without its space would end the process."
    def full(*args): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    pictures = iter([Image.new("RGB", (12, 12))]*3)
    with pytest.raises(DiffDAError, match="Cannot write .*x.npy: the disk is full"):
        write_array(pictures, 3, 12, tmp_path/"x.npy")
    assert len(list(pictures)) == 3 and not list(tmp_path.iterdir())

def test_arrays_end_to_end():
    first, second = images(5, 4, 0), images(7, 4, 1)
    order = torch.from_numpy(np.random.default_rng(0).permutation(12))
    both = Stacked([first, second], "cpu")
    assert len(both) == 12
    assert np.array_equal(both[order].numpy(), np.concatenate([first, second])[order.numpy()])
    assert np.array_equal(both[torch.tensor([5, 5, 0])].numpy(), np.stack([second[0], second[0], first[0]]))

# the loop

def run(tmp_path, name="c.pt", training=PLAIN, n=17, n_syn=0, net=None, strategy=None, **more):
    "Train on `n` real and `n_syn` synthetic images of noise; (network, history)."
    net = net or small()
    x = [images(n)] + ([images(n_syn, seed=1)] if n_syn else [])
    tests = {"test": (images(20, seed=2), np.arange(20)%K), "val": (images(9, seed=3), np.arange(9)%K)}
    owners = list(np.arange(n_syn)%n)
    history = fit(net, x, soft(n + n_syn), owners, tests, training, strategy or FullConcatenation(),
                  path=tmp_path/name, device="cpu", **more)
    return net, history

def plain_batches(n, seed, epoch):
    "Positions of one epoch in pieces of 8, a single left-over one with those before it."
    order = torch.randperm(n, generator=generator_for(seed, epoch, "order"))
    cuts = [*range(0, n - 1, 8), n]
    return [order[start:stop] for start, stop in zip(cuts, cuts[1:])]

def normalised(x): return (torch.from_numpy(x).float()/255 - .46)/.23

def smoothed(q): return .9*q + .1*(1 - q)/2

def soft_loss(logits, q): return -(q*logits.log_softmax(1)).sum(1).mean()

def by_hand(n, epochs, seed, n_syn=0):
    "The same training written with PyTorch's own scheduler and a loss spelled out."
    net, x = small(), normalised(np.concatenate([images(n), images(n_syn, seed=1)]))
    q = smoothed(torch.from_numpy(soft(n + n_syn)))
    opt = torch.optim.SGD(net.parameters(), .05, momentum=.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, epochs)
    losses, rates = [], []
    for epoch in range(epochs):
        each = []
        for idx in plain_batches(n + n_syn, seed, epoch):
            loss = soft_loss(net(x[idx]), q[idx])
            opt.zero_grad()
            loss.backward()
            opt.step()
            each.append(loss.item())
        rates.append(schedule.get_last_lr()[0])
        schedule.step()
        losses.append(np.mean(each))
    return net, losses, rates

@pytest.mark.parametrize("n, n_syn, steps", [(17, 0, 2), (16, 0, 2), (10, 15, 3)])
def test_training_equals_plain_pytorch(tmp_path, untouched, n, n_syn, steps):
    "17 = 8 + 9 and 25 = 8 + 8 + 9: a batch of one is never made."
    net, history = run(tmp_path, n=n, n_syn=n_syn, seed=5)
    expected, losses, _ = by_hand(n, 3, 5, n_syn)
    assert [h["steps"] for h in history] == [steps]*3
    assert [h["loss"] for h in history] == pytest.approx(losses, rel=1e-3)
    for (name, ours), plain in zip(net.state_dict().items(), expected.state_dict().values()):
        assert torch.allclose(ours.float(), plain.float(), atol=2e-3), name

def test_the_strategy_is_asked_for_phase_and_positions(tmp_path):
    "With all that it may depend on; another object may answer for the epoch."
    asked = []
    class Second:
        def positions(self, *args):
            asked.append(args)
            return np.array([0, 3, 3, 5])
    class First:
        def phase(self, *args):
            asked.append(args)
            return Second(), .5
    training = dataclasses.replace(PLAIN, epochs=2, schedule="constant", draws=4)
    history = run(tmp_path, training=training, n=4, n_syn=3, strategy=First(), seed=6)[1]
    assert asked == [(0, 2, "constant"), ([0, 1, 2], 4, 6, 0, 4),
                     (1, 2, "constant"), ([0, 1, 2], 4, 6, 1, 4)]
    assert [h["steps"] for h in history] == [1, 1]

def test_two_phases_end_on_real_images(tmp_path):
    "Four epochs of 10 + 15 images in batches of 8, then two of the 10 real ones."
    training = dataclasses.replace(PLAIN, epochs=6)
    strategy = TwoPhase(second_share=1/3)
    _, history = run(tmp_path, training=training, n=10, n_syn=15, seed=5, strategy=strategy)
    assert [h["steps"] for h in history] == [3]*4 + [2]*2

@pytest.fixture
def rates(monkeypatch):
    "(learning rate, beta 1 or momentum) of each step of an optimizer made by `train`."
    found = []
    def spied(base):
        class Spy(base):
            def step(self, *args, **more):
                group = self.param_groups[0]
                found.append((group["lr"], group.get("momentum") or group["betas"][0]))
                return super().step(*args, **more)
        return Spy
    for name in ("SGD", "Adam"):
        monkeypatch.setattr(train.torch.optim, name, spied(getattr(torch.optim, name)))
    return found

def test_learning_rate_falls_along_a_half_cosine(tmp_path, rates):
    run(tmp_path, training=dataclasses.replace(PLAIN, epochs=5, evaluations=1), n=8)
    found = [rate for rate, _ in rates]
    assert found == pytest.approx(by_hand(8, 5, 0)[2])
    assert rates[0] == (.05, .9) and found[4] == pytest.approx(.05*.5*(1 + np.cos(np.pi*.8)))

def test_rates_of_a_constant_schedule(tmp_path, rates):
    training = dataclasses.replace(PLAIN, epochs=4, evaluations=1, optimizer="adam", schedule="constant")
    run(tmp_path, training=training, n=8)
    assert rates == [(.05, .9)]*4
    drawing = dataclasses.replace(training, draws=8)
    run(tmp_path, "two.pt", training=drawing, n=8, n_syn=8, strategy=TwoPhase())
    # each phase has its rate
    assert [rate for rate, _ in rates[4:]] == pytest.approx([.05]*3 + [.005])

def stopped(at, every_s=0):
    "`resumable`, but for a user who interrupts before step `at` (None: never); it saves after each step."
    def loop(n, step, state, path, **more):
        def limited(i):
            if i == at: raise KeyboardInterrupt
            return step(i)
        return torch_core.resumable(n, limited, state, path, every_s=every_s, progress=False)
    return loop

KINDS = [("standard", "fc"), ("mixup", "grr"), ("randaugment", "lrr")]

@pytest.mark.parametrize("kind, strategy", KINDS)
def test_resumed_training_equals_undisturbed_training(tmp_path, monkeypatch, kind, strategy):
    training = dataclasses.replace(PLAIN, pad=2, epochs=4)
    args = dict(training=training, n=10, n_syn=20, kind=kind, strategy=get_strategy(strategy), seed=3)
    net, history = run(tmp_path, "undisturbed.pt", **args)
    for at in (1, 3):
        monkeypatch.setattr(train, "resumable", stopped(at))
        with pytest.raises(KeyboardInterrupt): run(tmp_path, "stopped.pt", **args)
        assert (tmp_path/"stopped.pt").exists()
    monkeypatch.setattr(train, "resumable", stopped(None))
    again, found = run(tmp_path, "stopped.pt", **args)
    assert found == history and same_weights(net, again)

LATER = dict(optimizer="adam", layers="last", schedule="constant", draws=20, rotation=15., vflip=.5, lr=.01)

@pytest.mark.parametrize("more", [dict(LATER, layers="all"), LATER])
def test_resumed_probe_equals_undisturbed_probe(tmp_path, monkeypatch, more):
    "Adam's moments, the draws and the statistics of batch normalisation survive; two runs are one."
    training = dataclasses.replace(PLAIN, epochs=3, **more)
    args = dict(training=training, n=5, n_syn=10, strategy=LocalReplacement(), seed=3)
    net, history = run(tmp_path, "undisturbed.pt", **args)
    # 20 = 8 + 8 + 4
    assert run(tmp_path, "again.pt", **args)[1] == history and [h["steps"] for h in history] == [3]*3
    with monkeypatch.context() as patch:
        patch.setattr(train, "resumable", stopped(2))
        with pytest.raises(KeyboardInterrupt): run(tmp_path, "stopped.pt", **args)
    again, found = run(tmp_path, "stopped.pt", **args)
    assert found == history and same_weights(net, again)

def test_a_probe_changes_the_last_layer_only(tmp_path):
    net, _ = run(tmp_path, training=dataclasses.replace(PLAIN, layers="last"), n=16)
    before, statistics = small().state_dict(), ("running_mean", "running_var", "num_batches_tracked")
    for name, values in net.state_dict().items():
        changes = name.startswith("fc.") or name.endswith(statistics)
        assert torch.equal(values, before[name]) != changes, name

@pytest.mark.parametrize("decay", [0., .1])
def test_adams_first_step_by_hand(tmp_path, decay):
    "After bias correction the moments are the gradient g and its square: a weight moves by lr g/(|g| + eps)."
    training = dataclasses.replace(PLAIN, epochs=1, batch_size=64, optimizer="adam", layers="last",
                                   schedule="constant", lr=.01, weight_decay=decay, momentum=.8)
    net, _ = run(tmp_path, training=training, n=12)
    start = small().train()
    order = torch.randperm(12, generator=generator_for(0, 0, "order"))
    x, q = normalised(images(12))[order], smoothed(torch.from_numpy(soft(12))[order])
    soft_loss(start(x), q).backward()
    g = start.fc.weight.grad + decay*start.fc.weight.detach()
    moved = net.fc.weight.detach() - start.fc.weight.detach()
    # where the gradient is almost zero, its sign is rounding
    sure = g.abs() > 1e-4
    expected = -.01*g/(g.abs() + 1e-8)
    assert torch.allclose(moved[sure], expected[sure], atol=1e-5) and sure.float().mean() > .9

class Drops(torch.nn.Module):
    "The small network behind dropout."
    def __init__(self):
        super().__init__()
        self.net, self.drop = small(), torch.nn.Dropout(.5)

    def forward(self, x): return self.net(self.drop(x))

def test_dropout_draws_nothing_from_the_caller(tmp_path, untouched):
    one, two = (run(tmp_path, f"{i}.pt", net=Drops())[1] for i in range(2))
    assert one == two != run(tmp_path, "plain.pt")[1]
    assert math.isfinite(one[-1]["loss"])

WRONG = [("optimizer", "Unknown optimizer of Training 'adm': did you mean adam"),
         ("layers", "Unknown layers of Training 'adm': known: all, last"),
         ("schedule", "Unknown schedule of Training 'adm': known: constant, cosine")]

@pytest.mark.parametrize("setting, says", WRONG)
def test_unknown_ways_to_train(setting, says):
    with pytest.raises(DiffDAError, match=says): dataclasses.replace(PLAIN, **{setting: "adm"})

def test_cut_into_batches():
    expected = {1: [1], 7: [7], 8: [8], 9: [9], 16: [8, 8], 17: [8, 9], 18: [8, 8, 2]}
    for n, sizes in expected.items():
        assert [len(batch) for batch in batches(torch.arange(n), 8)] == sizes
        assert torch.equal(torch.cat(batches(torch.arange(n), 8)), torch.arange(n))

def test_steps_are_counted_without_cutting():
    for n in range(1, 40):
        for size in range(2, 12):
            assert steps_per_epoch(n, size) == len(batches(torch.arange(n), size)), (n, size)

def test_when_the_test_set_is_looked_at(tmp_path):
    def at(epochs, evaluations=0):
        return look_at(dataclasses.replace(PLAIN, epochs=epochs, evaluations=evaluations))
    assert at(30, 3) == {10, 20, 30} and at(4) == {1, 2, 3, 4} and at(2, 9) == {1, 2}
    for epochs in range(1, 40):
        for n in range(8):
            found = at(epochs, n)
            assert epochs in found and len(found) == min(n or epochs, epochs)
    history = run(tmp_path, training=dataclasses.replace(PLAIN, epochs=4, evaluations=2), n=8)[1]
    assert ["test" in h for h in history] == [False, True, False, True] == ["val" in h for h in history]

def test_evaluation_does_not_disturb_training(tmp_path):
    often, seldom = (dataclasses.replace(PLAIN, evaluations=n) for n in (0, 1))
    one, two = run(tmp_path, "often.pt", often)[0], run(tmp_path, "seldom.pt", seldom)[0]
    assert same_weights(one, two)

# which number is reported

def look(epoch, test=None, val=None):
    "An entry of the history; `test` and `val` are top-1 accuracies, where there was a look at them."
    entry = {"epoch": epoch, "steps": 1, "loss": 0.}
    if test is not None: entry["test"] = {"top1": test, "top5": 100., "per_class": []}
    if val is not None: entry["val"] = {"top1": val}
    return entry

def reported(found):
    "{name: (top-1 accuracy, epoch)} of a summary."
    return {name: entry and (entry["top1"], entry["epoch"]) for name, entry in found.items()}

def test_selection():
    "`best_val` is chosen by the validation images, although the test images like epoch 3 better."
    found = summary([look(1, 60., 50.), look(2), look(3, 70., 40.), look(4, 65., 45.)])
    assert reported(found) == {"last": (65., 4), "best_val": (60., 1), "best_test": (70., 3)}

def test_selection_without_validation_images():
    found = summary([look(1, 60.), look(2, 50.)])
    assert reported(found) == {"last": (50., 2), "best_val": None, "best_test": (60., 1)}

def test_first_of_equal_epochs_is_taken():
    assert summary([look(1, 50., 40.), look(2, 60., 40.)])["best_val"]["epoch"] == 1

# where it ran

def test_environment_tells_what_it_ran_on():
    found = environment()
    assert found["versions"]["torch"] in (torch.__version__, torch.__version__.split("+")[0])
    assert set(found) == {"device", "peak_memory_mb", "python", "commit", "versions"}
    assert found["peak_memory_mb"] > 50

def git(folder, *command):
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    command = ["git", "-C", str(folder), *who, *command]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

@pytest.fixture
def clone(tmp_path, monkeypatch):
    "A repository with a package `diffda`, which stands for this one."
    folder = tmp_path/"clone"/"diffda"
    folder.mkdir(parents=True)
    (folder/"__init__.py").write_text("")
    (folder.parent/"settings.ini").write_text("[DEFAULT]\n")
    git(folder.parent, "init", "-q")
    git(folder.parent, "add", ".")
    git(folder.parent, "commit", "-q", "-m", "first")
    monkeypatch.setattr(train, "package_dir", lambda: folder)
    return folder.parent

def test_the_commit_is_that_of_the_packages_own_clone(clone):
    assert own_commit() == git(clone, "rev-parse", "HEAD") and len(own_commit()) == 40

def test_a_package_inside_another_repository_has_no_commit(clone, monkeypatch):
    installed = clone/"venv"/"lib"/"diffda"
    installed.mkdir(parents=True)
    (installed/"__init__.py").write_text("")
    monkeypatch.setattr(train, "package_dir", lambda: installed)
    assert own_commit() is None
    git(clone, "add", "-A")
    git(clone, "commit", "-q", "-m", "second")
    assert own_commit() is None

@pytest.mark.parametrize("missing", ["settings.ini", "diffda/__init__.py"])
def test_a_repository_that_only_holds_the_package_is_not_its_clone(clone, missing):
    "Another project beside which the folder lies, or one without this project's settings."
    git(clone, "rm", "-q", "--cached", missing)
    if missing == "settings.ini": (clone/missing).unlink()
    assert own_commit() is None

def test_no_git_and_no_repository_are_no_commit(clone, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "package_dir", lambda: tmp_path/"nowhere")
    assert own_commit() is None
    monkeypatch.setattr(train, "package_dir", lambda: clone/"diffda")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert own_commit() is None and environment()["commit"] is None

# on a GPU

@pytest.mark.gpu
def test_training_on_a_gpu(tmp_path):
    net, owners = small(), list(np.arange(20)%17)
    tests = {"test": (images(9, seed=2), np.arange(9)%K)}
    history = fit(net, [images(17), images(20, seed=1)], soft(37), owners, tests, PLAIN, FullConcatenation(),
                  path=tmp_path/"c.pt", device="cuda")
    assert len(history) == 3 and next(net.parameters()).is_cuda
    assert np.isfinite([h["loss"] for h in history]).all()
