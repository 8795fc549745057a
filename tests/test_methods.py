"""Every registered method, whatever it is called: it resolves on every task, trains in seconds, and draws the
same images whatever the batches."""
import dataclasses

import numpy as np, pytest

from diffda import jobs
from diffda.backbone import get_backbone
from diffda.core import DiffDAError
from diffda.data import get_task, list_tasks
from diffda.generate import SyntheticPool, draw_pool
from diffda.jobs import for_parts, plan
from diffda.method import AUGMENTS, Method, full_names, get_method, list_methods, own_names, resolved
from diffda.pipeline import record_of, run_all, share_in
from diffda.settings import PROTOCOLS, Chain, Part, parts_of
from diffda.store import Store
from diffda.utilize import Strategy

METHODS = list_methods()
DRAWING = [name for name in METHODS if get_method(name).generate]

# 2 images of each of 5 classes
TASK = dataclasses.replace(get_task("nano-digits-5"), shots=2)
TASK = dataclasses.replace(TASK, training=dataclasses.replace(TASK.training, epochs=1, evaluations=1))
# as little as any part can do with; for steps see `small`
SMALL = dict(strength=.9, num_copies=2)

def small(name):
    "The job of method `name` on the small task with the least work that its settings allow."
    method = get_method(name)
    known = {*own_names(method.generate), *full_names(method.finetune)}
    few = {s: 2 if s.endswith(".steps") else 3 for s in known if s.endswith("steps")}
    said = {k: v for k, v in SMALL.items() if k in known}
    return plan([method], [TASK], (0,), **few, **said)[0]

@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    "A store for all methods, so that what several of them need is tuned once."
    return Store(tmp_path_factory.mktemp("store"))

def test_the_papers_baselines_are_there():
    assert {"baseline", "mixup", "cutmix", "real-guidance"} <= set(METHODS) and METHODS[0] == "baseline"

@pytest.mark.parametrize("name", METHODS)
def test_names_and_parts(name):
    method = get_method(name)
    assert method.name == name and method.title and set(method.parts) == {"finetune", "generate", "utilize"}
    known = set(list_tasks()) | {get_task(task).family for task in list_tasks()}
    # an override for a task or a family that does not exist never comes into force
    assert set(method.overrides) <= known

def final(part):
    "Whether no setting that work needs is left open."
    needed = [name for name, field in part.fields().items() if field.metadata.get("needed")]
    return all(getattr(part, name) is not None for name in needed)

@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_resolves_on_every_task(name, protocol):
    "All tasks under all protocols; no task that comes with the package is one on which a method cannot run."
    for task in list_tasks():
        job = plan([name], [task], (0,), protocol=protocol)[0]
        method = job.method
        assert isinstance(method.utilize, Strategy) and method.augment in AUGMENTS and method.overrides == {}
        assert method.recipe is None and job.task.name == task and job.protocol == protocol
        assert all(map(final, (*parts_of(method.finetune), *parts_of(method.generate), method.utilize))), task
        assert method.generate is None or method.generate.guidance_scale is not None

def test_gif_plans_on_medical_tasks_under_all_protocols():
    medical = [task for task in list_tasks() if get_task(task).family == "medical"]
    assert {"blood-5", "skin-10", "nano-scans-5", "brain-tumor"} <= set(medical)
    for protocol in PROTOCOLS:
        for job in plan(["gif"], medical, (0,), protocol=protocol): assert job.method.generate.num_copies >= 1

BARE = dataclasses.replace(get_task("nano-digits-5"), name="bare", metaclass=None, medium=None)

def refused(tasks):
    "{(method, task): sentence} of the combinations that cannot be planned."
    found = {}
    for name in METHODS:
        for task in tasks:
            try: plan([name], [task], (0,))
            except DiffDAError as e: found[name, task.name] = str(e)
    return found

def test_a_method_that_lacks_words_for_a_task_says_so_before_it_starts():
    "Only those do whose prompts name what the task has not."
    families = ("conventional", "fine-grained", "medical")
    wrong = refused([dataclasses.replace(BARE, name=f, family=f, scale="paper") for f in families])
    worded = {("diff-aug", "fine-grained"), ("diff-ii", "fine-grained"), ("diff-mix", "fine-grained")}
    medical = {(name, "medical") for name in ("diff-aug", "diff-ii", "diff-mix", "gif")}
    assert set(wrong) == worded | medical
    assert all("needs a metaclass, and this task has none" in wrong[key] for key in worded)
    assert all("needs a medium, and this task has none" in wrong[key] for key in medical)

def test_diff_ii_has_phrases_for_few_metaclasses():
    wrong = refused([dataclasses.replace(BARE, scale="paper", metaclass="mushroom")])
    assert set(wrong) == {("diff-ii", "bare")}
    assert "none for task 'bare' (metaclass mushroom); give some, suffixes=" in wrong["diff-ii", "bare"]
    task = dataclasses.replace(BARE, scale="paper", metaclass="mushroom")
    for said in ({"suffix_fraction": 0.}, {"suffixes": ["in the snow"]}):
        plan(["diff-ii"], [task], (0,), **said)

BACKBONES = ("sd14", "sd15", "sd21", "sd21@512", "sd35")

def test_methods_on_every_generator():
    "Two methods are for Stable Diffusion 1 and 2 only, and say so."
    wrong = {}
    for name in METHODS:
        for backbone in BACKBONES:
            try: plan([name], [TASK], (0,), backbone=backbone)
            except DiffDAError as e: wrong[name, backbone] = str(e)
    assert set(wrong) == {("diff-ii", "sd35"), ("mvc", "sd35")}
    assert all("It runs on those of Stable Diffusion 1 and 2." in said for said in wrong.values())

def test_no_two_methods_are_the_same_work():
    for task in list_tasks("nano"):
        keys = {job.method.name: job.train.key for job in plan(METHODS, [task], (0,))}
        assert len(set(keys.values())) == len(METHODS), (task, keys)

# some nano tasks take all the images there are
FEW = [task for task in list_tasks("nano") if (get_task(task).shots or 100) <= 10]

@pytest.mark.parametrize("name", DRAWING)
def test_describes_its_images_on_every_nano_task(name):
    """Rows are made without a model: names once, labels that sum to one, prompts filled in, one image per
    real image and copy."""
    nano = get_backbone("nano")
    for job in plan([name], FEW, (0,)):
        split, part = job.split, job.method.generate
        rows = part.rows(for_parts(split), nano, 0)
        assert len(rows) == len({r["file_name"] for r in rows}) == len(split.train)*part.num_copies
        k, ids = len(split.class_names), set(split.train.ids)
        for row in rows:
            weights = row["label_weights"]
            assert sum(pair["weight"] for pair in weights) == pytest.approx(1)
            assert all(0 <= pair["weight"] <= 1 and 0 <= pair["label"] < k for pair in weights)
            assert 0 <= row["label"] < k and "{" not in row["prompt"] and row["source_id"] in ids
        assert rows == part.rows(for_parts(split), nano, 0) and rows != part.rows(for_parts(split), nano, 1)

@pytest.mark.parametrize("name", METHODS)
def test_runs_from_end_to_end(name, shared):
    job = small(name)
    record = run_all([job], shared, progress=False).iloc[0]
    made = 20 if name in DRAWING else 0
    assert (record["method"], record.n_real, record.n_synthetic) == (name, 10, made)
    assert 0 <= record.top1 <= record.top5 <= 100 and record.steps > 0 and len(record.per_class) == 5
    if not made: assert record["pool"] is None and np.isnan(record["share"])
    else: check_pool(SyntheticPool(record["pool"], 20), job.split, record["share"])

def check_pool(pool, split, share):
    images = [pool.image(i) for i in range(20)]
    assert all(image.mode == "RGB" and np.asarray(image).std() > 0 for image in images)
    assert np.allclose(pool.weights(5).sum(1), 1) and set(pool.rows.source_id) == set(split.train.ids)
    assert (pool.rows.groupby("source_id").size() == 2).all() and (np.isnan(share) or 0 <= share <= 100)

@pytest.mark.parametrize("name", DRAWING)
def test_images_do_not_depend_on_batches_or_shards(name, shared, tmp_path):
    job = small(name)
    tuned = shared.make(job.tuning[-1]) if job.tuning else None
    def draw(folder, **how):
        return draw_pool(job.method.generate, for_parts(job.split), tmp_path/folder, job.backbone, 0,
                         tuned and str(tuned), **how)
    pools = [draw("all", batch_size=64), draw("single", batch_size=1)]
    assert draw("halves", batch_size=4, shard=(1, 2)) is None
    pools.append(draw("halves", batch_size=4, shard=(0, 2)))
    first, *others = ([np.asarray(p.image(i)).astype(int) for i in range(len(p))] for p in pools)
    assert len(first) == 20
    for other in others: assert max(np.abs(a - b).max() for a, b in zip(first, other, strict=True)) <= 2
    for pool in pools[1:]: assert pool.rows.astype(str).equals(pools[0].rows.astype(str))

@pytest.mark.parametrize("name", DRAWING)
def test_copies_differ(name, shared):
    "Two copies of an image are two images."
    pool = SyntheticPool(run_all([small(name)], shared, progress=False)["pool"][0])
    rows = pool.rows.reset_index()
    pairs = rows.groupby("source_id")["index"].agg(list)
    def differ(a, b): return not np.array_equal(np.asarray(pool.image(a)), np.asarray(pool.image(b)))
    assert sum(differ(a, b) for a, b in pairs) >= .8*len(pairs)

def test_a_new_method_is_covered_by_registering_it():
    "Nothing in this file names a method that has to pass: the lists come from the registry."
    assert METHODS == list_methods() and all(isinstance(get_method(name), Method) for name in METHODS)

def test_all_parts_are_parts():
    for method in map(get_method, METHODS):
        for chain in (method.finetune, method.generate, method.filter):
            assert chain is None or isinstance(chain, (Part, Chain)), method.name
            assert all(isinstance(part, Part) for part in parts_of(chain)), method.name

def test_the_share_is_looked_up_once_and_needs_the_pool(shared, monkeypatch):
    "What the judge says is kept with the store; without the pool there is nothing to ask about."
    job = small("real-guidance")
    shared.make(job.share)
    asked = []
    def judge(images, names, dataset):
        asked.append((len(images), names[0], dataset))
        return 40.
    monkeypatch.setattr(jobs, "reference_share", judge)
    kept = share_in(job, shared)
    shared.make(job.share)
    assert not asked and 0 <= kept <= 100
    other = dataclasses.replace(job, seed=1)
    # nobody has asked yet
    assert np.isnan(share_in(other, shared)) and not asked
    for _ in range(2): shared.make(other.share)
    assert share_in(other, shared) == 40. and asked == [(20, "five", "nano/digits")]
    assert small("baseline").share is None
    assert dataclasses.replace(other, task=dataclasses.replace(TASK, scale="paper")).share is None

def test_a_record_names_the_share(shared):
    job = small("real-guidance")
    run_all([job], shared, progress=False)
    assert record_of(job, shared)["share"] == shared.counts(job.share)["share"]

def test_an_override_brings_parts_of_its_own():
    "What a method is made of may depend on the task, and so may its settings."
    from diffda.generate import SDEdit
    method = Method("mine", "Mine", generate=SDEdit(num_copies=2),
                    overrides={"nano-digits-5": {"generate": SDEdit(num_copies=3, strength=.4)}})
    nano = get_backbone("nano")
    few, fashion = (resolved(method, get_task(name), nano) for name in ("nano-digits-5", "nano-fashion"))
    assert (few.generate.num_copies, few.generate.strength, fashion.generate.num_copies) == (3, .4, 2)
