"Every registered method, whatever it is called: it resolves on every task, trains in seconds, and draws the same images whatever the batches."
import dataclasses, functools

import numpy as np, pytest

from diffda.backbone import class_words, get_backbone
from diffda.core import Store
from diffda.data import get_split, get_task, list_tasks
from diffda.generate import SyntheticPool, generate_pool
from diffda.method import AUGMENTS, STRATEGIES, Method, get_method, list_methods
from diffda.pipeline import adaptation_of, plan, pool_stage, run_all, train_stage

METHODS = list_methods()
DRAWING = [m for m in METHODS if get_method(m).generate]

TASK = dataclasses.replace(get_task("nano-digits-5"), shots=2)          # 2 images of each of 5 classes
TASK = dataclasses.replace(TASK, recipe=dataclasses.replace(TASK.recipe, epochs=1, evaluations=1))
SMALL = dict(strength=.9, num_copies=2)                                 # as little as any part can do with; steps: see `small`

def small(name):
    "The run of method `name` on the small task with the least work that its settings allow."
    m = get_method(name)
    few = {s: 2 if s.endswith(".steps") else 3 for s in m.settings if s.endswith("steps")}
    return plan([m], [TASK], (0,), **few, **{k: v for k, v in SMALL.items() if k in m.settings})[0]

split_of = functools.lru_cache(get_split)

@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    "A store for all methods, so that what several of them need is tuned once."
    return Store(tmp_path_factory.mktemp("store"))

def test_the_papers_baselines_are_there(): assert {"baseline", "mixup", "cutmix", "real-guidance"} <= set(METHODS) and METHODS[0] == "baseline"

@pytest.mark.parametrize("name", METHODS)
def test_names_and_parts(name):
    m = get_method(name)
    assert m.name == name and m.title and set(m.parts) == {"finetune", "generate", "utilize"}
    known = set(list_tasks()) | {get_task(t).family for t in list_tasks()}
    assert set(m.overrides) <= known, "an override for a task or a family that does not exist never comes into force"

@pytest.mark.parametrize("name", METHODS)
def test_resolves_on_every_task(name):
    for t in list_tasks():
        m = get_method(name).at(get_task(t))
        assert m.overrides == {} and m.utilize in STRATEGIES and m.augment in AUGMENTS and 0 <= m.p <= 1
        if m.generate: assert m.generate.num_copies >= 1

@pytest.mark.parametrize("name", METHODS)
def test_has_stages_on_every_nano_task(name):
    for t in list_tasks("nano"):
        run, split = plan([name], [t], (0,))[0], split_of(t, 0)
        assert (pool_stage(run, split) is None) == (name not in DRAWING) and len(train_stage(run, split).key) == 16

def test_no_two_methods_are_the_same_work():
    for t in list_tasks("nano"):
        keys = {m: train_stage(plan([m], [t], (0,))[0], split_of(t, 0)).key for m in METHODS}
        assert len(set(keys.values())) == len(METHODS), (t, keys)

@pytest.mark.parametrize("name", DRAWING)
def test_describes_its_images_on_every_nano_task(name):
    "Rows are made without a model: names once, labels that sum to one, prompts filled in, one image per real image and copy."
    for t in [t for t in list_tasks("nano") if get_task(t).shots <= 10]:
        split, part = split_of(t, 0), get_method(name).at(get_task(t)).generate
        rows = part.rows(split, get_backbone("nano"), 0)
        assert len(rows) == len({r["file_name"] for r in rows}) == len(split.train)*part.num_copies
        for r in rows:
            assert sum(p["weight"] for p in r["label_weights"]) == pytest.approx(1) and all(0 <= p["weight"] <= 1 and 0 <= p["label"] < len(split.class_names) for p in r["label_weights"])
            assert 0 <= r["label"] < len(split.class_names) and "{" not in r["prompt"] and r["source_id"] in split.train.ids
        assert rows == part.rows(split, get_backbone("nano"), 0) and rows != part.rows(split, get_backbone("nano"), 1)

@pytest.mark.parametrize("name", METHODS)
def test_runs_from_end_to_end(name, shared):
    run = small(name)
    r = run_all([run], shared, progress=False).iloc[0]
    split = split_of(TASK, 0)
    assert (r["method"], r.n_real, r.n_synthetic) == (name, 10, 20 if name in DRAWING else 0)
    assert 0 <= r.top1 <= r.top5 <= 100 and r.steps > 0 and len(r.per_class) == 5
    if name not in DRAWING: assert r["pool"] is None and np.isnan(r["share"])
    else:
        pool = SyntheticPool(r["pool"], 20)
        assert all(pool.image(i).mode == "RGB" and np.asarray(pool.image(i)).std() > 0 for i in range(20)) and np.allclose(pool.weights(5).sum(1), 1)
        assert set(pool.rows.source_id) == set(split.train.ids) and (pool.rows.groupby("source_id").size() == 2).all()
        assert np.isnan(r["share"]) or 0 <= r["share"] <= 100

@pytest.mark.parametrize("name", DRAWING)
def test_images_do_not_depend_on_batches_or_shards(name, shared, tmp_path):
    run, split = small(name), split_of(TASK, 0)
    tuned = adaptation_of(run, split, shared)
    def draw(folder, **how): return generate_pool(run.method.generate, split, tmp_path/folder, backbone=TASK.backbone, seed=0, adaptation=tuned and str(tuned), progress=False, **how)
    pools = [draw("all", batch_size=64), draw("single", batch_size=1)]
    assert draw("halves", batch_size=4, shard=(1, 2)) is None
    pools.append(draw("halves", batch_size=4, shard=(0, 2)))
    first, *others = ([np.asarray(p.image(i)).astype(int) for i in range(len(p))] for p in pools)
    assert len(first) == 20
    for other in others: assert max(np.abs(a - b).max() for a, b in zip(first, other, strict=True)) <= 2
    for p in pools[1:]: assert p.rows.astype(str).equals(pools[0].rows.astype(str))

@pytest.mark.parametrize("name", DRAWING)
def test_copies_differ(name, shared):
    "Two copies of an image are two images."
    run = small(name)
    pool = SyntheticPool(run_all([run], shared, progress=False)["pool"][0])
    rows = pool.rows.reset_index()
    pairs = rows.groupby("source_id")["index"].agg(list)
    assert sum(not np.array_equal(np.asarray(pool.image(a)), np.asarray(pool.image(b))) for a, b in pairs) >= .8*len(pairs)

def test_a_new_method_is_covered_by_registering_it():
    "Nothing in this file names a method that has to pass: the lists come from the registry."
    assert METHODS == list_methods() and all(isinstance(get_method(m), Method) for m in METHODS)

def test_the_share_is_looked_up_once_and_needs_the_pool(shared, monkeypatch):
    "What the judge says is kept with the store; without the pool there is nothing to ask about."
    from diffda import pipeline
    run = small("real-guidance")
    run_all([run], shared, progress=False)
    asked = []
    monkeypatch.setattr(pipeline, "reference_share", lambda images, names, dataset: asked.append((len(images), names[0], dataset)) or 40.)
    kept = pipeline.share_of(run, shared)
    assert not asked and (np.isnan(kept) or 0 <= kept <= 100)
    other = dataclasses.replace(run, seed=1)
    assert np.isnan(pipeline.share_of(other, shared)) and not asked                     # no pool yet
    pipeline.pool_of(other, shared, progress=False)
    assert [pipeline.share_of(other, shared) for _ in range(2)] == [40., 40.] and asked == [(20, "five", "nano/digits")]
    assert np.isnan(pipeline.share_of(small("baseline"), shared))
    assert np.isnan(pipeline.share_of(dataclasses.replace(other, task=dataclasses.replace(TASK, scale="paper")), shared))
