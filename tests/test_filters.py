"The confidence of a classifier by hand, who is kept, what a filter changes in the keys, and redrawing."
import dataclasses, json

import numpy as np, pytest, torch
from PIL import Image

from diffda import filters
from diffda.backbone import CHECKER, get_backbone
from diffda.classifiers import new_classifier
from diffda.core import DiffDAError
from diffda.data import get_task
from diffda.filters import (FILTERS, Confidence, Filter, Redraw, SafetyChecker, dropped, filter_stage,
                            get_filter,
                            kept_pool)
from diffda.generate import SyntheticPool, redrawn
from diffda.jobs import filters_of, plan, settings_of
from diffda.pipeline import run_all
from diffda.settings import Chain
from diffda.store import Store

TASK = get_task("nano-digits-1")
BRIEF = dataclasses.replace(TASK.training, epochs=2, evaluations=1, batch_size=4)
TASK = dataclasses.replace(TASK, training=BRIEF)
QUICK = dict(strength=.9, num_inference_steps=4, num_copies=4, utilize="fc")

def one(**said): return plan(["real-guidance"], [TASK], (0,), **{**QUICK, **said})[0]

@pytest.fixture(scope="module")
def sifted(tmp_path_factory):
    "A store with a filtered run, its job and its record."
    store = Store(tmp_path_factory.mktemp("store"))
    job = one(filter="confidence", **{"Confidence.share": .3})
    return store, job, run_all([job], store, progress=False).iloc[0]

# registry

def test_filters_by_name():
    assert {"confidence", "safety"} <= set(FILTERS.names())
    assert get_filter("confidence") == Confidence() and get_filter("none") is get_filter(None) is None
    chain = Confidence() >> Confidence(share=.2)
    assert get_filter(chain) is chain and get_filter(chain.parts[1]).share == .2
    with pytest.raises(DiffDAError, match="Unknown filter 'confidance': did you mean confidence"):
        get_filter("confidance")

@pytest.mark.parametrize("share", [-.1, 1., "half"])
def test_a_share_lies_below_one(share):
    with pytest.raises(DiffDAError, match="Confidence: share"): Confidence(share=share)

# who is kept

@pytest.mark.parametrize("n, share, want", [(10, .1, 1), (9, .1, 0), (20, .3, 6), (10, 0., 0), (3, .99, 2),
                                            (7, .5, 3),
                                            (100, .29, 29), (1, .9, 0)])
def test_the_share_is_rounded_down(n, share, want):
    "0.29*100 is a little less than 29 in floating point; that does not cost an image."
    assert dropped(n, share) == want == (~Confidence(share=share).kept(np.arange(n))).sum()

def test_the_lowest_scores_go():
    kept = Confidence(share=.4).kept(np.array([.5, .1, .9, .3, .7]))
    assert kept.tolist() == [True, False, True, False, True]

def test_of_equal_scores_the_earlier_image_stays():
    assert Confidence(share=.5).kept(np.full(6, .5)).tolist() == [True]*3 + [False]*3
    assert Confidence(share=.25).kept(np.array([.2, .9, .2, .9])).tolist() == [True, True, False, True]

# the confidence of a classifier

def softmax(logits):
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return weights/weights.sum(1, keepdims=True)

def by_hand(store, job):
    "The probability that the baseline's last net gives to each image's label, from its checkpoint."
    baseline = plan(["baseline"], [TASK], (0,))[0]
    assert job.by("baseline").train.key == baseline.train.key
    net = new_classifier(TASK.training.classifier, 5)
    saved = torch.load(store.dir(baseline.train)/"checkpoint.pt", map_location="cpu", weights_only=True)
    net.load_state_dict(saved["net"])
    net.eval()
    pool = SyntheticPool(store.dir(job.pool)/"pool")
    pixels = np.stack([np.asarray(pool.image(i)) for i in range(len(pool))]).transpose(0, 3, 1, 2)/255
    mean, std = (np.array(v).reshape(1, 3, 1, 1) for v in (TASK.training.mean, TASK.training.std))
    with torch.no_grad(): logits = net(torch.tensor((pixels - mean)/std, dtype=torch.float32)).numpy()
    return softmax(logits.astype(np.float64))[np.arange(len(pool)), pool.rows.label]

def test_confidence_by_hand(sifted):
    store, job, record = sifted
    expected = by_hand(store, job)
    said = json.loads((store.dir(job.sifted)/"kept.json").read_text())
    assert np.allclose(said["score"], expected, atol=1e-5)
    # 6 of 20 go, and they are those with the lowest scores
    kept = np.array(said["kept"])
    assert (~kept).sum() == 6 and expected[~kept].max() <= expected[kept].min()
    pool = SyntheticPool(store.dir(job.pool)/"pool")
    left = kept_pool(store, job.sifted)
    assert left.rows.file_name.tolist() == pool.rows.file_name[kept].tolist() == [
        name for name, keep in zip(said["file_name"], said["kept"]) if keep]

def test_a_filtered_record(sifted):
    store, job, record = sifted
    assert (record.n_real, record.n_synthetic, record.n_dropped) == (5, 14, 6)
    assert (record["filter"], record["Confidence.share"]) == ("confidence", .3)
    assert record.seconds_filter >= 0 and record.work_filter == 20
    # the baseline's net that judged is in the store, with a record of its own
    assert store.done(job.by("baseline").train) and store.counts(job.sifted)["kept"] == 14

def test_soft_labels_count_by_their_weights(sifted):
    "An image that counts for two classes is as sure as its weights say."
    store, job, _ = sifted
    pool = SyntheticPool(store.dir(job.pool)/"pool")
    folders = [store.dir(job.by("baseline").train)]
    hard = {label: relabelled(pool, [(label, 1.)]) for label in (0, 1)}
    soft = relabelled(pool, [(0, .75), (1, .25)])
    first, second, shared = (Confidence().scores(p, job, folders) for p in (*hard.values(), soft))
    assert np.allclose(shared, .75*first + .25*second, atol=1e-6)

def relabelled(pool, pairs):
    "`pool` with these label weights for all images."
    other = pool.take(range(len(pool)))
    other.rows["label_weights"] = [[{"label": label, "weight": weight} for label, weight in pairs]]*len(pool)
    return other

# keys

def test_a_filter_changes_the_key_of_the_training_and_not_the_pools():
    plain, sifted = one(), one(filter="confidence")
    more = one(filter="confidence", **{"Confidence.share": .5})
    assert plain.pool.key == sifted.pool.key == more.pool.key
    assert len({job.train.key for job in (plain, sifted, more)}) == 3
    assert plain.sifted is plain.pool and sifted.sifted.inputs[0] is sifted.pool
    assert one(filter="none").train.key == plain.train.key

def test_how_images_are_shown_to_the_judge_is_in_the_filters_key():
    small, large = (one(filter="confidence", resize=size, crop=32) for size in (32, 40))
    assert small.pool.key == large.pool.key and small.sifted.key != large.sifted.key

def test_settings_of_a_filter():
    job = one(filter="confidence", **{"Confidence.share": .2})
    found = settings_of(job)
    assert (found["filter"], found["Confidence.share"]) == ("confidence", .2)
    assert found["Confidence.classifier"] == "baseline"
    assert settings_of(one())["filter"] is None and "Confidence.share" not in settings_of(one())

def test_a_judge_of_ones_own():
    "The method that trains the judge is a setting."
    def judged_by(name): return one(filter="confidence", **{"Confidence.classifier": name})
    plain, mixed = judged_by("baseline"), judged_by("mixup")
    assert mixed.sifted.inputs[1].key == plan(["mixup"], [TASK], (0,))[0].train.key
    assert plain.sifted.key != mixed.sifted.key

# chains

@dataclasses.dataclass(frozen=True, kw_only=True)
class Brightness(Filter):
    "Drop the darkest images."
    name, title = "brightness", "brightness"
    def scores(self, pool, job, folders):
        return np.array([np.asarray(pool.image(i)).mean() for i in range(len(pool))])

@dataclasses.dataclass(frozen=True, kw_only=True)
class First(Filter):
    "Keep the first images only; there is nothing to score."
    n: int = 3
    name, title = "first", "the first images"
    def scores(self, pool, job, folders): return [None]*len(pool)
    def kept(self, scores): return np.arange(len(scores)) < self.n

def test_filters_work_one_after_the_other(sifted, tmp_path):
    store, _, _ = sifted
    job = one(filter=Brightness(share=.5) >> First(n=3))
    assert isinstance(job.method.filter, Chain) and settings_of(job)["filter"] == "brightness >> first"
    store.make(job.sifted)
    pool = SyntheticPool(store.dir(job.pool)/"pool")
    bright = np.array([np.asarray(pool.image(i)).mean() for i in range(20)])
    best = np.sort(np.argsort(-bright, kind="stable")[:10])
    assert kept_pool(store, job.sifted).rows.file_name.tolist() == pool.rows.file_name[best[:3]].tolist()
    before, after = job.sifted.inputs[0], job.sifted
    assert (store.counts(before)["kept"], store.counts(after)["images"]) == (10, 10)
    assert store.counts(after)["kept"] == 3
    # the other way round is other work
    other = one(filter=First(n=3) >> Brightness(share=.5))
    assert other.sifted.key != job.sifted.key and other.train.key != job.train.key
    # the first of the two is shared with those who use it alone
    assert one(filter=Brightness(share=.5)).sifted.key == before.key

def test_a_filter_that_drops_all_is_one_sentence(sifted):
    store, job = sifted[0], one(filter=First(n=0))
    with pytest.raises(DiffDAError, match="Filter 'first' drops all 20 images; nothing is left"):
        store.make(job.sifted)
    assert not store.done(job.sifted)

@dataclasses.dataclass(frozen=True, kw_only=True)
class Short(First):
    "A filter that forgets an image."
    name = "short"
    def kept(self, scores): return np.ones(len(scores) - 1, bool)

def test_a_filter_that_decides_on_too_few_is_one_sentence(sifted):
    with pytest.raises(DiffDAError, match="Filter 'short' decided on 19 of 20 images"):
        sifted[0].make(one(filter=Short()).sifted)

def test_a_filter_without_scores_says_what_it_lacks():
    with pytest.raises(TypeError, match="Filter does not score images: it needs a method scores"):
        Filter().scores(None, None, [])
    with pytest.raises(TypeError, match="Redraw does not find anything: it needs a method finder"):
        Redraw().finder(None, "cpu")

def test_a_list_of_other_images_is_refused(sifted, tmp_path):
    store, job, _ = sifted
    stage = filter_stage(First(), job, job.pool)
    store.run(stage)
    path = store.dir(stage)/"kept.json"
    listed = json.loads(path.read_text())
    path.write_text(json.dumps({**listed, "file_name": listed["file_name"][::-1]}))
    with pytest.raises(DiffDAError, match="kept.json lists other images than .*; delete .* and run again"):
        kept_pool(store, stage)

def test_a_method_may_bring_its_own_filter(sifted):
    method = dataclasses.replace(one().method, name="mine", title="Mine", filter=First(n=2))
    job = plan([method], [TASK], (0,), **QUICK)[0]
    assert method.parts["filter"] == "First" and settings_of(job)["First.n"] == 2
    assert plan([method], [TASK], (0,), filter="none", **QUICK)[0].sifted is job.pool or (
        plan([method], [TASK], (0,), filter="none", **QUICK)[0].sifted.key == job.pool.key)

# redrawing

def test_flawed_images_are_drawn_again():
    "Image 1 is fine at its second try, image 3 never."
    asked, tried = [], []
    def flawed(images):
        asked.append(list(images))
        return [image in ("b0", "d0", "d1", "d2") for image in images]
    def again(bad, attempt):
        tried.append((list(bad), attempt))
        return [f"{'abcd'[i]}{attempt}" for i in bad]
    images, attempts, bad = redrawn(["a0", "b0", "c0", "d0"], flawed, again, 2)
    assert (images, attempts, bad) == (["a0", "b1", "c0", "d2"], [0, 1, 0, 2], [3])
    assert tried == [([1, 3], 1), ([3], 2)] and asked == [["a0", "b0", "c0", "d0"], ["b1", "d1"], ["d2"]]

def test_without_tries_nothing_is_drawn_again():
    def again(bad, attempt): pytest.fail("drawn again")
    assert redrawn(["a", "b"], lambda images: [False, True], again, 0) == (["a", "b"], [0, 0], [1])

@dataclasses.dataclass(frozen=True, kw_only=True)
class Flagging(Redraw):
    "A checker that flags by how often it has seen an image of a source: `flags[source]` times."
    flags: int = 1
    name, title = "flagging", "a checker for tests"
    def finder(self, backbone, device):
        seen = {"n": 0}
        def flawed(images):
            seen["n"] += 1
            # every second image of the first look, and of the next ones until `flags` looks have passed
            return [i%2 == 0 and seen["n"] <= self.flags for i in range(len(images))]
        return flawed

def pool_of(store, job):
    store.make(job.pool)
    return SyntheticPool(store.dir(job.pool)/"pool")

def test_a_checker_has_flagged_images_drawn_again(sifted, tmp_path):
    store = Store(tmp_path)
    plain, checked = pool_of(sifted[0], one()), pool_of(store, one(filter=Flagging(flags=1, tries=2)))
    assert len(checked) == 20 and checked.rows.flagged.tolist() == [1, 0]*10
    same = [np.array_equal(np.asarray(plain.image(i)), np.asarray(checked.image(i))) for i in range(20)]
    assert same == [False, True]*10
    # another noise, the same request
    assert (checked.rows.seed != plain.rows.seed).tolist() == [True, False]*10
    assert checked.rows.prompt.equals(plain.rows.prompt)

def test_images_that_stay_flawed_are_left_out(tmp_path):
    store, job = Store(tmp_path), one(filter=Flagging(flags=2, tries=1))
    says = "5 of 20 images are left out .*a checker for tests flagged all 2 tries"
    with pytest.warns(UserWarning, match=says):
        pool = pool_of(store, job)
    assert len(pool) == 15 and set(pool.rows.flagged) == {0, 1} and not list(tmp_path.rglob("*left_out*.png"))
    # what the classifier sees is what is left
    record = run_all([job], store, progress=False).iloc[0]
    assert record.n_synthetic == 15

def test_a_checker_is_in_the_key_of_the_pool():
    "It decides on what is drawn, and there is no stage of its own."
    plain, checked = one(), one(filter=Flagging())
    assert plain.pool.key != checked.pool.key != one(filter=Flagging(tries=2)).pool.key
    assert checked.sifted is checked.pool

def test_a_checker_and_a_filter():
    "The order in the chain does not matter to the checker: it looks while images are drawn."
    a, b = one(filter=Flagging() >> First()), one(filter=First() >> Flagging())
    assert a.pool.key == b.pool.key and a.sifted.key == b.sifted.key

# the safety checker

def test_the_safety_checker_of_a_generator(monkeypatch):
    "A generator without one of its own takes that of Stable Diffusion 1; `load_checker` opens it."
    assert SafetyChecker().checkpoints(get_backbone("sd15")) == ()
    assert SafetyChecker().checkpoints(get_backbone("sd21")) == (CHECKER,)
    def checker(backbone, device): return lambda images: [backbone.name == device for _ in images]
    monkeypatch.setattr(filters, "load_checker", checker)
    flawed = SafetyChecker().finder(get_backbone("sd15"), "cpu")
    assert flawed([Image.new("RGB", (2, 2))]) == [False]

def test_safety_is_short_for_the_checker():
    birds = dict(methods=["real-guidance"], tasks=["birds-1"], seeds=(0,))
    asked, none = plan(**birds, safety=3)[0], plan(**birds)[0]
    assert filters_of(asked) == (SafetyChecker(tries=3),) and filters_of(none) == ()
    assert settings_of(asked)["safety"] == 3
