"From a plan to a table: what shares a stage and what must not, what enters the training, what is refused."
import dataclasses, json, math, shutil
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch

from diffda import generate, jobs
from diffda.backbone import LORA, get_backbone
from diffda.classifiers import NANO_NETS, nano_weights
from diffda.core import DiffDAError
from diffda.data import Training, get_split, get_task
from diffda.finetune import FineTune
from diffda.generate import SDEdit, SyntheticPool, generate_pool
from diffda.jobs import for_parts, opened, plan, settings_of
from diffda.method import Method, get_method, list_methods, resolved
from diffda.pipeline import record_of, results_of, run_all
from diffda.places import nano_world
from diffda.settings import setting
from diffda.store import Stage, Store
from diffda.torch_core import generator_for
from diffda.train import batches, write_array
from diffda.utilize import FullConcatenation

TASK = dataclasses.replace(get_task("nano-scans-25"), shots=2, val_per_class=2)
BRIEF = dataclasses.replace(TASK.training, epochs=2, evaluations=2, batch_size=8)
TASK = dataclasses.replace(TASK, training=BRIEF)
QUICK = dict(strength=.5, num_inference_steps=4, num_copies=2)
COLUMNS = {"method", "title", "task", "counterpart", "scale", "family", "seed", "key", "utilize", "strength",
           "num_copies", "equal", "top1", "top5", "best_val", "best_test", "per_class", "seconds_train",
           "seconds_generate", "pool", "n_real", "n_synthetic", "n_dropped", "steps", "lr", "filter"}

def one(method="real-guidance", task=TASK, seed=0, **changes):
    return plan([method], [task], (seed,), **{**QUICK, **changes})[0]

def keys(job): return job.pool and job.pool.key, job.train.key

def trained_with(task=TASK, **changes):
    "`task` with another training."
    return dataclasses.replace(task, training=dataclasses.replace(task.training, **changes))

BOTH = ["baseline", "real-guidance"]

@pytest.fixture(scope="module")
def full(tmp_path_factory):
    "A store in which the baseline and Real Guidance with full concatenation are done."
    store = Store(tmp_path_factory.mktemp("store"))
    return store, run_all(plan(BOTH, [TASK], (0,), **QUICK), store, progress=False)

@pytest.fixture
def copied(full, tmp_path): return Store(shutil.copytree(full[0].root, tmp_path/"store"))

# keys

NANO = get_backbone("nano")
POOL = {"strength": .7, "num_inference_steps": 6, "num_copies": 3, "guidance_scale": NANO.guidance_scale + 1,
        "prompt": "article"}

@pytest.mark.parametrize("name, value", POOL.items())
def test_settings_of_the_generation_change_both_keys(name, value):
    a, b = keys(one()), keys(one(**{name: value}))
    assert a[0] != b[0] and a[1] != b[1]

def test_guidance_zero_is_not_the_default_guidance():
    assert keys(one(guidance_scale=0.))[0] != keys(one())[0]

OTHERS = {"shots": dict(task=dataclasses.replace(TASK, shots=3)), "seed": dict(seed=1),
          "validation": dict(task=dataclasses.replace(TASK, val_per_class=3))}

@pytest.mark.parametrize("changed", OTHERS.values(), ids=OTHERS)
def test_other_images_change_all_keys(changed):
    for method in ("real-guidance", "baseline"):
        before, after = keys(one(method)), keys(one(method, **changed))
        assert all(a != b for a, b in zip(before, after) if a)

TRAINING = {"classifier": "resnet50", "init": "nano-fashion", "epochs": 3, "batch_size": 9, "lr": .2,
            "weight_decay": .2, "momentum": .2, "label_smoothing": .2, "resize": 40, "crop": 28, "pad": 3,
            "hflip": .2, "mean": (.1,)*3, "std": (.1,)*3, "evaluations": 1, "optimizer": "adam",
            "layers": "last",
            "schedule": "constant", "draws": 9, "rotation": 5., "vflip": .2, "interpolation": "bicubic"}

def test_every_field_of_a_training_is_tried():
    assert set(TRAINING) == {f.name for f in dataclasses.fields(Training)}

@pytest.mark.parametrize("name, value", TRAINING.items())
def test_settings_of_the_training_change_its_key_only(name, value):
    a, b = keys(one()), keys(one(task=trained_with(**{name: value})))
    assert a[0] == b[0] and a[1] != b[1]

USES = [dict(utilize="fr"), dict(utilize="grr"), dict(augment="mixup"), dict(epochs=7),
        dict(filter="confidence")]

@pytest.mark.parametrize("changes", USES, ids=str)
def test_use_changes_the_key_of_the_training_only(changes):
    a, b = keys(one()), keys(one(**changes))
    assert a[0] == b[0] and a[1] != b[1]

@pytest.mark.parametrize("strategy, matters", [("fc", False), ("fr", False), ("lrr", True), ("grr", True)])
def test_p_matters_where_images_are_replaced_at_random(strategy, matters):
    a, b = keys(one(utilize=strategy, p=.2)), keys(one(utilize=strategy, p=.6))
    assert a[0] == b[0] and (a[1] != b[1]) == matters

def test_what_does_not_matter_changes_no_key():
    default = keys(one())
    assert keys(one(guidance_scale=NANO.guidance_scale)) == default
    assert keys(one(task=dataclasses.replace(TASK, name="other", counterpart="other"))) == default
    assert keys(one(dataclasses.replace(get_method("real-guidance"), name="other", title="Other"))) == default
    # full concatenation is the yardstick itself
    assert keys(one(equal="steps")) == default
    assert keys(one(strength=1)) == keys(one(strength=1.)) != default
    base = keys(one("baseline"))
    for changes in (dict(p=.9), dict(num_copies=9), dict(strength=.1), dict(utilize="grr")):
        assert keys(one("baseline", **changes)) == base

WITHOUT = ("baseline", "mixup", "cutmix", "randaugment", "autoaugment")

def test_methods_without_images_have_keys_of_their_own():
    assert len({keys(one(m))[1] for m in (*WITHOUT, "real-guidance")}) == 6
    assert all(keys(one(m))[0] is None for m in WITHOUT)

def test_epochs_of_a_fixed_size_are_equal_steps_for_all():
    task = trained_with(draws=20)
    for method in BOTH:
        job = one(method, task, equal="steps")
        assert job.training == task.training and job.train.about.work == 20*task.training.epochs

def test_other_starting_weights_change_the_key(tmp_path, monkeypatch):
    "A classifier that starts from a net of the nano world is another one when that net is built anew."
    from safetensors.torch import save_file
    task = trained_with(init="nano-fashion")
    before, scratch = keys(one("baseline", task)), keys(one("baseline"))
    world = tmp_path/"world"
    (world/"classifiers").mkdir(parents=True)
    for path in nano_world().iterdir():
        if path.name != "classifiers": (world/path.name).symlink_to(path)
    for net in NANO_NETS:
        weights = {k: v + 1 for k, v in nano_weights(net).items()}
        save_file(weights, world/"classifiers"/f"{net}.safetensors")
    monkeypatch.setenv("DIFFDA_NANO", str(world))
    assert keys(one("baseline", task))[1] != before[1] and keys(one("baseline"))[1] == scratch[1]

# the key and the work are made of the same objects

def test_key_and_work_settle_alike(tmp_path, monkeypatch):
    "What draws, trains and puts epochs together is what the key was made of."
    worked, draw, fit = {}, generate.draw_pool, jobs.fit
    def drawing(part, split, folder, backbone, seed, *more, **how):
        worked.update(part=part, backbone=backbone, pool_seed=seed)
        return draw(part, split, folder, backbone, seed, *more, **how)
    def fitting(*given, strategy, kind, seed, **how):
        worked.update(training=given[5], strategy=strategy, kind=kind, seed=seed)
        return fit(*given, strategy=strategy, kind=kind, seed=seed, **how)
    monkeypatch.setattr(generate, "draw_pool", drawing)
    monkeypatch.setattr(jobs, "fit", fitting)
    job, store = one(utilize="grr", p=.3, augment="cutmix"), Store(tmp_path)
    store.make(job.train)
    drawn, trained = job.pool.config, job.train.config
    assert worked["part"] == drawn["part"] == job.method.generate and worked["pool_seed"] == drawn["seed"]
    assert {k: worked[k] for k in ("training", "strategy", "seed")} == {k: trained[k] for k in
                                                                        ("training", "strategy", "seed")}
    assert worked["kind"] == trained["augment"] == "cutmix" and worked["strategy"].p == .3
    assert worked["backbone"] == job.backbone == NANO

def test_a_pool_made_by_hand_has_the_key_of_the_job(tmp_path):
    "The same settings lead to the same digest, whoever fills in what was left open."
    job = one()
    part = SDEdit(**QUICK)
    generate_pool(part, for_parts(job.split), tmp_path/"pool")
    assert (tmp_path/"pool"/".made-of").read_text() == job.pool.key

def test_a_job_is_final():
    "Nobody has to settle anything after `plan`: settling once more changes nothing."
    for name in list_methods():
        job = one(name, get_task("nano-digits-5"))
        assert resolved(job.method, job.task, job.backbone) == job.method

# the tables share their stages

def test_tables_2_8_and_9_share_what_they_have_in_common():
    task, seeds = get_task("nano-fashion"), (0, 1, 2)
    def planned(methods, **said): return plan(methods, [task], seeds, num_copies=5, epochs=None, **said)
    guided, strengths = ["real-guidance"], (.1, .3, .5, .7, .9)
    t2 = planned(["baseline", "mixup", "cutmix", *guided], utilize="fc")
    t2 += planned(["baseline"], equal="steps", utilize="fc")
    t8 = planned(["baseline"], equal="epochs")
    t8 += planned(guided, p=.5, equal="epochs", vary={"utilize": ["fc", "fr", "lrr", "grr"]})
    t9 = planned(["baseline"], utilize="fc") + planned(guided, utilize="fc", vary={"strength": strengths})
    made = [[keys(job) for job in table] for table in (t2, t8, t9)]
    pools, nets = ([{key[i] for key in table} - {None} for table in made] for i in (0, 1))
    assert [len(p) for p in pools] == [3, 3, 15] and len(set().union(*pools)) == 15
    assert pools[0] == pools[1] and pools[0] < pools[2]
    # baseline, Mixup, CutMix, Real Guidance, baseline at equal steps; three more strategies;
    # four more strengths;
    # three seeds each
    assert [len(n) for n in nets] == [15, 15, 18] and len(set().union(*nets)) == 3*(5 + 3 + 4)
    assert len(nets[0] & nets[1]) == len(nets[0] & nets[2]) == len(nets[1] & nets[2]) == 3*2

def test_a_run_stands_in_a_plan_once():
    assert len(plan(["baseline", "baseline"], [TASK, TASK], (0, 0, 1))) == 2

# anything can be varied

VARIED = {"classifier": ["small-resnet", "resnet50"], "batch_size": [4, 8], "lr": [.1, .2], "shots": [1, 2],
          "fraction": [.5, 1.], "backbone": ["nano", "nano@64"], "num_inference_steps": [4, 6],
          "strength": [.5, .9], "p": [.2, .4], "filter": [None, "confidence"], "utilize": ["grr", "lrr"],
          "augment": ["standard", "mixup"], "num_copies": [1, 2], "equal": ["epochs", "steps"],
          "guidance_scale": [1., 2.], "resize": [32, 40], "val_per_class": [0, 1], "epochs": [1, 2]}

@pytest.mark.parametrize("name, values", VARIED.items())
def test_two_values_are_two_jobs(name, values):
    "And each job says its own value under the setting's name."
    said = {"utilize": "grr", **QUICK}
    said.pop(name, None)
    # None would leave the setting as it is
    asked = ["none" if value is None else value for value in values]
    planned = plan(["real-guidance"], [TASK], (0,), vary={name: asked}, **said)
    assert [settings_of(job)[name] for job in planned] == values
    assert len({keys(job)[1] for job in planned}) == 2
    others = [{k: v for k, v in settings_of(job).items() if k != name} for job in planned]
    # equal steps are more epochs, and a larger generator has other defaults
    if name not in ("equal", "backbone", "filter"): assert others[0] == others[1]

def test_varying_two_settings_is_a_grid():
    planned = plan(BOTH, [TASK], (0, 1), vary={"lr": [.1, .2], "strength": [.5, .9]}, num_inference_steps=4)
    found = [(job.method.name, job.seed, settings_of(job)["lr"], settings_of(job).get("strength"))
             for job in planned]
    guided = [("real-guidance", seed, lr, s) for lr in (.1, .2) for s in (.5, .9) for seed in (0, 1)]
    # the baseline has no strength
    base = [("baseline", seed, lr, None) for lr in (.1, .2) for seed in (0, 1)]
    assert sorted(found, key=str) == sorted(guided + base, key=str) and len(found) == len(set(found)) == 12

SAME = [({"strength": [.5]}, {"SDEdit.strength": [.5]}), ({"epochs": [3]}, {"Training.epochs": [3]}),
        ({"lr": [1]}, {"lr": [1.]})]

@pytest.mark.parametrize("one_name, other_name", SAME, ids=str)
def test_one_setting_under_two_names_is_one_job(one_name, other_name):
    a, b = (plan(["real-guidance"], [TASK], (0,), vary=names)[0] for names in (one_name, other_name))
    assert jobs.identity(a) == jobs.identity(b) and keys(a) == keys(b) and settings_of(a) == settings_of(b)

def test_a_copy_of_a_generator_at_another_path_has_its_keys(tmp_path):
    "What counts is the content; a folder has no recommended guidance scale, so it is said."
    copy = shutil.copytree(NANO.source, tmp_path/"copy")
    said = dict(vary={"backbone": ["nano", str(copy)]}, **QUICK)
    a, b = plan(["real-guidance"], [TASK], (0,), guidance_scale=3., **said)
    assert [settings_of(job)["backbone"] for job in (a, b)] == ["nano", str(copy)] and keys(a) == keys(b)

def test_the_grid_is_run(tmp_path):
    "A few settings of each kind for real: every job has its own numbers, and the pools are shared."
    task = dataclasses.replace(get_task("nano-digits-1"), training=dataclasses.replace(BRIEF, epochs=1))
    planned = plan(["real-guidance"], [task], (0,), utilize="fc", num_inference_steps=4, num_copies=1,
                   vary={"lr": [.01, .1], "strength": [.5, 1.]})
    records = run_all(planned, tmp_path, progress=False)
    assert records.lr.tolist() == [.01, .01, .1, .1] and records.strength.tolist() == [.5, 1.]*2
    assert records.key.nunique() == 4 and records["pool"].nunique() == 2
    assert records.n_synthetic.tolist() == [5]*4
    assert len(list((tmp_path/"pool").iterdir())) == 2 and len(list((tmp_path/"train").iterdir())) == 4

@dataclasses.dataclass(frozen=True, kw_only=True)
class Sharing(FullConcatenation):
    "A strategy with settings that are called as others are already."
    share: float = setting(.5, "(0, 1]")
    fraction: float = setting(.5, "(0, 1]")
    own: int = 1
    name, title = "sharing", "for a test"

def test_a_setting_that_shares_its_name_carries_its_class():
    "A record has a share, and a task a fraction: those of a strategy neither overwrite them nor are lost."
    method = Method("sharing", "Sharing", generate=SDEdit(**QUICK), utilize=Sharing())
    said = {"Sharing.fraction": .7, "own": 2, "fraction": .9, "vary": {"Sharing.share": [.1, .2]}}
    a, b = plan([method], [TASK], (0,), **said)
    assert [settings_of(job)["Sharing.share"] for job in (a, b)] == [.1, .2] and a.train.key != b.train.key
    assert a.method.utilize == Sharing(share=.1, fraction=.7, own=2) and a.task.fraction == .9
    assert settings_of(a)["own"] == 2 and "share" not in settings_of(a)

# equal steps

def steps_of(job):
    "The optimiser steps of a job, from the settings that its stage is made of."
    n, made = len(job.split.train), job.made
    training = job.train.config["training"]
    shown = {"fc": n + made, "fr": made}.get(job.strategy.name, n)
    epoch = len(batches(torch.arange(shown), training.batch_size))
    return epoch*training.epochs, epoch

@pytest.mark.parametrize("task", ["nano-fashion", "nano-fashion-100", "nano-digits-1", "nano-digits-5",
                                  "nano-scans-25"])
@pytest.mark.parametrize("copies", [1, 5])
def test_equal_steps_are_as_many_as_full_concatenation_takes(task, copies):
    def job(method, **said): return plan([method], [task], (0,), num_copies=copies, **said)[0]
    full = steps_of(job("real-guidance", utilize="fc"))[0]
    compared = [("baseline", {}), ("mixup", {})]
    compared += [("real-guidance", {"utilize": name}) for name in ("fc", "fr", "lrr", "grr")]
    for method, said in compared:
        total, epoch = steps_of(job(method, equal="steps", **said))
        assert abs(total - full) < epoch, (method, said, total, full)

def test_steps_of_the_record_are_those_counted(full):
    store, records = full
    counted = [steps_of(one("baseline"))[0], steps_of(one())[0]]
    assert records.steps.tolist() == counted == [2*math.ceil(20/8), 2*math.ceil(60/8)]

# a record

def test_columns_and_numbers(full):
    records = full[1]
    assert COLUMNS <= set(records.columns) and records.method.tolist() == BOTH
    assert records.n_real.tolist() == [20, 20] and records.n_synthetic.tolist() == [0, 40]
    assert records.utilize.isna().tolist() == [True, False] and records.utilize[1] == "fc"
    assert records["filter"].isna().all()
    assert records.pool.isna().tolist() == [True, False] and len(SyntheticPool(records.pool[1])) == 40
    assert records.key.tolist() == [one(m).train.key for m in BOTH]

def test_top1_is_the_last_epoch_and_never_the_best_on_the_test_images(full):
    store, records = full
    for r, job in zip(records.itertuples(), (one("baseline"), one())):
        folder = store.dir(job.train)
        result, history = (json.loads((folder/name).read_text()) for name in ("result.json", "history.json"))
        assert r.top1 == result["last"]["top1"] == history[-1]["test"]["top1"]
        assert result["last"]["epoch"] == 2
        best = max(history, key=lambda epoch: epoch["val"]["top1"])
        assert r.best_test == max(h["test"]["top1"] for h in history) and r.best_val == best["test"]["top1"]
    worse = {**result, "last": {**result["last"], "top1": 11.},
             "best_test": {**result["best_test"], "top1": 99.},
             "best_val": {**result["best_val"], "top1": 55.}}
    row = results_of(worse)
    assert (row["top1"], row["best_val"], row["best_test"]) == (11., 55., 99.)
    assert math.isnan(results_of({**worse, "best_val": None})["best_val"])

def test_a_record_says_what_it_was_made_of(full):
    store, records = full
    record = record_of(one(), store)
    assert record["split_digest"] == get_split(TASK, 0).digest and record["seed"] == 0
    assert record["pool_digest"] == SyntheticPool(record["pool"]).digest()
    assert {k: record[k] for k in (*QUICK, "epochs", "lr", "shots")} == {**QUICK, "epochs": 2, "lr": BRIEF.lr,
                                                                         "shots": 2}
    assert {"python", "versions", "device"} <= set(record["environment"])
    assert record == {**record, **settings_of(one())}

def test_a_second_run_makes_nothing(full, monkeypatch):
    store, records = full
    def again(*given, **named): pytest.fail("made again")
    monkeypatch.setattr(generate, "draw_pool", again)
    for name in ("fit", "write_array"): monkeypatch.setattr(jobs, name, again)
    found = run_all(plan(BOTH, [TASK], (0,), **QUICK), str(store.root), progress=False)
    pd.testing.assert_frame_equal(found, records)

def test_another_store_gives_the_same_record(full, tmp_path):
    store, records = full
    again = run_all(plan(["real-guidance"], [TASK], (0,), **QUICK), tmp_path/"other", progress=False)
    # where it is, and what was measured on the way
    same = [c for c in again.columns if c not in ("pool", "environment") and not c.startswith("seconds_")]
    expected = pd.DataFrame([record_of(one(), store)])
    pd.testing.assert_frame_equal(again[same], expected[same])

def test_other_settings_do_not_find_the_old_pool(full):
    store, records = full
    more = run_all([one(num_copies=1)], store, progress=False)
    assert more["pool"][0] != records["pool"][1] and more.n_synthetic[0] == 20
    assert len(SyntheticPool(records["pool"][1])) == 40

def test_estimate_counts_stages(full, capsys):
    run_all(plan(BOTH, [TASK], (0,), **QUICK), full[0])
    said = "To do: 0 x generate, 0 x train (nothing to do); 3 of 3 stages"
    assert said in capsys.readouterr().out

# what the classifier gets

@dataclasses.dataclass(frozen=True)
class Softened(SDEdit):
    "SDEdit whose images count for a quarter as the class after their own."
    def rows(self, split, *given):
        k = len(split.class_names)
        def shared(label): return [{"label": label, "weight": .75}, {"label": (label + 1)%k, "weight": .25}]
        return [{**row, "label_weights": shared(row["label"])} for row in super().rows(split, *given)]

@dataclasses.dataclass(frozen=True)
class Nothing(SDEdit):
    "A part that makes no image."
    def rows(self, *given): return []

@pytest.mark.parametrize("utilize", ["grr", "fc"])
def test_synthetic_images_come_with_the_labels_of_their_own_rows(tmp_path, monkeypatch, utilize):
    seen, fit = {}, jobs.fit
    def spy(net, images, weights, owners, *given, **named):
        seen.update(images=images, weights=weights, owners=owners, **named)
        return fit(net, images, weights, owners, *given, **named)
    monkeypatch.setattr(jobs, "fit", spy)
    store, job = Store(tmp_path), one(Method("soft", "Soft", generate=Softened(**QUICK), utilize=utilize))
    store.make(job.train)
    pool, split = SyntheticPool(store.dir(job.pool)/"pool"), get_split(TASK, 0)
    images, weights = np.concatenate([np.asarray(a) for a in seen["images"]]), seen["weights"]
    assert seen["strategy"].name == utilize and images.shape == (60, 3, 32, 32) and weights.shape == (60, 10)
    for i in range(20):
        assert np.array_equal(images[i].transpose(1, 2, 0), np.asarray(split.train.read(i)))
        assert weights[i].tolist() == np.eye(10)[split.train.labels[i]].tolist()
    for j, row in enumerate(pool.rows.itertuples()):
        assert np.array_equal(images[20 + j].transpose(1, 2, 0), np.asarray(pool.image(j)))
        expected = np.zeros(10)
        expected[row.source_label] = .75
        expected[(row.source_label + 1)%10] = .25
        assert np.allclose(weights[20 + j], expected)
        assert split.train.ids[seen["owners"][j]] == row.source_id

@pytest.mark.parametrize("utilize", ["fc", "grr"])
def test_a_method_that_adds_nothing_is_an_error(tmp_path, utilize):
    method = Method("nothing", "Nothing", generate=Nothing(**QUICK), utilize=utilize)
    store, job = Store(tmp_path), one(method)
    with pytest.raises(DiffDAError, match="empty; a method that adds nothing"): store.make(job.train)
    assert not store.done(job.train)

# damage

def of_grr(store):
    "A job whose pool is in `store` and whose training is not, and the folder of that pool."
    return one(utilize="grr"), store.dir(one().pool)

def edit(folder, change):
    meta = folder/"pool"/"metadata.jsonl"
    rows = [json.loads(line) for line in meta.read_text().splitlines()]
    meta.write_text("".join(json.dumps(row) + "\n" for row in change(rows)))

def kept(store):
    "When each file that says that something is finished was written."
    paths = [p for p in store.root.rglob("*") if p.name in ("DONE", "result.json", "images.npy")]
    return {p: p.stat().st_mtime_ns for p in paths}

def untouched(before): return all(p.exists() and p.stat().st_mtime_ns == t for p, t in before.items())

ALTERED = {"source": {"source_id": "elsewhere-1"}, "label": {"label_weights": [{"label": 3, "weight": 1.}]}}

@pytest.mark.parametrize("altered", ALTERED.values(), ids=ALTERED)
def test_altered_metadata_is_refused(copied, altered):
    job, folder = of_grr(copied)
    before = kept(copied)
    edit(folder, lambda rows: [{**row, **altered} if i == 7 else row for i, row in enumerate(rows)])
    says = "metadata.jsonl is not what was written there. Delete .*DONE and run again"
    with pytest.raises(DiffDAError, match=says): run_all([job], copied, progress=False)
    assert untouched(before)

def test_a_store_can_be_moved(full, tmp_path):
    store = Store(shutil.copytree(full[0].root, tmp_path/"elsewhere"))
    pool = run_all([one()], store, progress=False)["pool"][0]
    assert Path(pool).is_relative_to(store.root) and len(SyntheticPool(pool))

def test_incomplete_weights_are_refused(tmp_path):
    store, job = Store(tmp_path), plan([toy("lora", ToyLoRA())], [TASK], (0,))[0]
    folder = store.make(job.tuning[0])
    (folder/LORA).unlink()
    with pytest.raises(DiffDAError, match=f"{LORA} is missing. Delete the folder and run again"):
        store.make(job.pool)

def test_a_pool_with_another_number_of_rows_is_refused(copied):
    job, folder = of_grr(copied)
    before = kept(copied)
    edit(folder, lambda rows: rows[:-1])
    with pytest.raises(DiffDAError, match="lists 39 images where 40 were made. Delete .*DONE and run again"):
        run_all([job], copied, progress=False)
    assert untouched(before)
    # what the sentence says
    (folder/"DONE").unlink()
    assert run_all([job], copied, progress=False).n_synthetic[0] == 40

def test_a_damaged_image_is_named_and_its_advice_works(copied):
    job, folder = of_grr(copied)
    pool = SyntheticPool(folder/"pool")
    digest, path = pool.digest(), folder/"pool"/pool.rows.file_name[5]
    # the pool has not been decoded yet
    for array in (copied.root/"array").iterdir():
        if json.loads((array/"stage.json").read_text())["config"]["what"] == "pool": shutil.rmtree(array)
    before = kept(copied)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(DiffDAError, match=f"{path} is damaged. Delete it and .*DONE, then run again"):
        run_all([job], copied, progress=False)
    assert untouched(before)
    path.unlink()
    (folder/"DONE").unlink()
    run_all([job], copied, progress=False)
    assert SyntheticPool(folder/"pool").digest() == digest

def test_a_damaged_record_is_written_anew(copied):
    folder = copied.dir(one("baseline").train)
    before = json.loads((folder/"result.json").read_text())
    (folder/"result.json").write_text("{")
    with pytest.raises(DiffDAError, match="is missing or damaged; delete .*DONE and run again"):
        run_all([one("baseline")], copied, progress=False)
    (folder/"DONE").unlink()
    run_all([one("baseline")], copied, progress=False)
    after = json.loads((folder/"result.json").read_text())
    assert {**after, "environment": None} == {**before, "environment": None}

def test_an_unwritable_store(tmp_path):
    (tmp_path/"file").write_text("")
    with pytest.raises(DiffDAError, match="Cannot write .*file"):
        run_all([one("baseline")], tmp_path/"file"/"store", progress=False)

def test_an_array_of_other_images_is_not_taken(store):
    def work(folder, store):
        write_array(iter([]), 3, 8, folder/"images.npy")
        return {"images": 4}
    stage = Stage("array", 1, work=work)
    store.run(stage)
    with pytest.raises(DiffDAError, match="holds 3 images where there are 4; delete .* and run again"):
        opened(store, stage)
    (store.dir(stage)/"images.npy").write_bytes(b"no array")
    with pytest.raises(DiffDAError, match="images.npy is damaged; delete .* and run again"):
        opened(store, stage)

# plans that cannot be

WRONG = [
    ((["real-guidence"], [TASK]), "did you mean real-guidance"),
    ((["baseline"], ["nano-fasion"]), "nano-fashion"),
    (([], [TASK]), "Nothing to run"), ((["baseline"], []), "Nothing to run"),
    ((["baseline"], [TASK], ()), "Nothing to run"),
    (("baseline", [TASK]), r"methods is a list, and 'baseline' is text; write \['baseline'\]"),
    ((["baseline"], "nano-digits-5"), r"tasks is a list, and 'nano-digits-5' is text"),
    ((["baseline"], [TASK], 0), r"seeds is a list, and 0 is a number; write \[0\]"),
    ((["baseline"], [TASK], "10"), "seeds is a list of whole numbers; found '1'"),
    ((["baseline"], [TASK], [1.5]), "seeds is a list of whole numbers; found 1.5"),
    ((["baseline"], [TASK], [True]), "seeds is a list of whole numbers; found True"),
    ((["baseline"], [TASK], None), "seeds is a list; found None"),
    (([3], [TASK]), "methods is a list of names")]

@pytest.mark.parametrize("given, says", WRONG)
def test_names(given, says):
    with pytest.raises(DiffDAError, match=says): plan(*given)

SETTINGS = [
    (dict(stength=.5), "Unknown setting 'stength': did you mean strength"),
    (dict(strength=0.), "strength lies in"),
    (dict(p=1.5, utilize="grr"), "GlobalReplacement: p lies in .*found 1.5"),
    (dict(utilize="xx"), "strategy 'xx'"),
    (dict(equal="time"), "equal"), (dict(augment="mixap"), "did you mean mixup"),
    (dict(strength=.1, num_inference_steps=5), "0 steps"),
    (dict(epochs="3"), "epochs is a whole number; found '3'"),
    (dict(epochs=-1), "epochs is at least 1; found -1"), (dict(crop=300), "crop is at most resize"),
    (dict(shots=0), "shots is at least 1"), (dict(fraction=2), r"fraction lies in \(0, 1\]; found 2"),
    (dict(filter="confidenc"), "did you mean confidence"), (dict(backbone=3), "backbone is a name, a folder"),
    ({"filter": "confidence", "Confidence.share": 2.}, r"Confidence: share lies in \[0, 1\); found 2"),
    (dict(safety=-1), "safety is how often"), (dict(safety=1), "nano generator has no safety checker"),
    (dict(vary={"lr": .1}), r"vary\['lr'\] is a list of the values to try; found 0.1"),
    (dict(vary={"lr": []}), r"vary\['lr'\] is a list"), (dict(vary={"lrx": [1]}), "Unknown setting 'lrx'")]

@pytest.mark.parametrize("changes, says", SETTINGS)
def test_settings(changes, says):
    with pytest.raises(DiffDAError, match=says): plan(["real-guidance"], [TASK], **changes)

TRAININGS = [
    (dict(crop=300), r"crop is at most resize \+ 2\*pad = 272 pixels; found 300"),
    (dict(epochs=-1), "epochs is at least"),
    (dict(epochs="3"), "epochs is a whole number"), (dict(mean=(1, 2)), "mean is a list of three numbers"),
    (dict(optimizer="sdg"), "did you mean sgd"), (dict(lr=0.), r"lr is more than 0|lr .*found 0.0")]

@pytest.mark.parametrize("fields, says", TRAININGS)
def test_trainings_that_cannot_be(fields, says):
    with pytest.raises(DiffDAError, match=says): Training(**fields)

def test_a_setting_of_a_method_that_another_call_plans():
    "A table plans its methods in several calls with the same changes; what one of them lacks is not unknown."
    with_it, without = (plan(["baseline"], [TASK], (0,), **said)[0] for said in ({"epsilon": .5}, {}))
    assert keys(with_it) == keys(without) and settings_of(with_it) == settings_of(without)
    assert plan(["gif"], [TASK], (0,), epsilon=.5)[0].method.generate.epsilon == .5

def test_overrides_by_family_and_task_and_then_by_hand():
    override = {"fine-grained": {"strength": .1, "utilize": "grr", "p": .1},
                "nano-digits-5": {"strength": .2}}
    own = Method("mine", "Mine", generate=SDEdit(strength=.9), overrides=override)
    def at(task, **said): return plan([own], [task], (0,), **said)[0].method
    fashion, few, other = (at(f"nano-{name}") for name in ("fashion", "digits-5", "digits-1"))
    assert (fashion.generate.strength, fashion.utilize.name) == (.9, "fc")
    assert (few.generate.strength, few.utilize.name, few.utilize.p, few.overrides) == (.2, "grr", .1, {})
    assert other.generate.strength == .1
    changed = at("nano-digits-5", strength=.4, p=None)
    assert (changed.generate.strength, changed.utilize.p) == (.4, .1)
    assert at("nano-digits-5", p=.9).utilize.p == .9

def test_the_papers_overrides_hold_at_nano_scale_too():
    def at(task): return plan(["real-guidance"], [task], (0,))[0].method
    fashion, few = at("nano-fashion"), at("nano-digits-5")
    assert (fashion.generate.strength, fashion.utilize.name) == (.9, "fc")
    assert (few.generate.strength, few.utilize.name, few.utilize.p) == (.1, "grr", .1)

# fine-tuning parts

TRAINED = []

def write_lora(folder, scale, seed):
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict
    unet = UNet2DConditionModel.from_pretrained(NANO.source, subfolder="unet")
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    g = generator_for(seed, "toy lora")
    for name, weights in unet.named_parameters():
        if "lora_" in name: weights.data = torch.randn(weights.shape, generator=g)*scale
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)

@dataclasses.dataclass(frozen=True)
class ToyLoRA(FineTune):
    scale: float = .3
    def train(self, split, backbone, previous, folder, seed, progress=True):
        TRAINED.append((self, split.digest, backbone, previous, folder, seed))
        if previous: (folder/"before").write_text(str(previous))
        write_lora(folder, self.scale, seed)
        return {"rank": 2}

def toy(name, finetune, **more):
    return Method(name, name, finetune=finetune, generate=SDEdit(**QUICK), **more)

def toy_job(finetune, seed=0, **more): return plan([toy("toy", finetune, **more)], [TASK], (seed,))[0]

def test_two_methods_share_what_was_fine_tuned(full, tmp_path):
    TRAINED.clear()
    store = Store(tmp_path)
    fewer = dataclasses.replace(toy("c", ToyLoRA()), generate=SDEdit(**{**QUICK, "num_copies": 1}))
    methods = [toy("a", ToyLoRA()), toy("b", ToyLoRA(), utilize="grr", augment="mixup"), fewer]
    a, b, c = planned = plan(methods, [TASK], (0,))
    stages = [[stage.key for stage in job.tuning] for job in planned]
    assert stages[0] == stages[1] == stages[2] and len(stages[0]) == 1
    assert keys(a)[0] == keys(b)[0] != keys(c)[0] and len({keys(job)[1] for job in planned}) == 3
    pools = [SyntheticPool(store.make(job.pool)/"pool") for job in planned]
    folder = store.dir(a.tuning[0])
    assert TRAINED == [(ToyLoRA(), a.split.digest, NANO, None, folder, 0)] and (folder/LORA).exists()
    plain = SyntheticPool(full[1]["pool"][1])
    assert pools[0].folder == pools[1].folder and pools[0].rows.prompt.equals(plain.rows.prompt)
    tuned, untuned = ([np.asarray(pool.image(i)) for i in range(40)] for pool in (pools[0], plain))
    assert any(not np.array_equal(a, b) for a, b in zip(tuned, untuned))
    record = run_all([a], store, progress=False).iloc[0]
    assert record.n_synthetic == 40 and record["ToyLoRA.scale"] == .3 and len(TRAINED) == 1
    assert record["finetune"] == "ToyLoRA"

def test_keys_follow_the_fine_tuning():
    def tuned(job): return [stage.key for stage in job.tuning]
    base = toy_job(ToyLoRA())
    assert keys(toy_job(ToyLoRA(.4)))[0] != keys(base)[0] != keys(toy_job(None))[0] == keys(one())[0]
    assert tuned(toy_job(ToyLoRA(.4))) != tuned(base) != tuned(toy_job(ToyLoRA(), 1))
    assert toy_job(None).tuning == []

def test_a_chain_hands_on_what_was_learned(tmp_path):
    TRAINED.clear()
    store, chain = Store(tmp_path), toy_job(ToyLoRA(.1) >> ToyLoRA(.2))
    first, second = chain.tuning
    assert [stage.config["part"] for stage in chain.tuning] == [ToyLoRA(.1), ToyLoRA(.2)]
    assert second.inputs[2:] == (first,) and toy_job(ToyLoRA(.1)).tuning[0].key == first.key
    single = toy_job(ToyLoRA(.2))
    assert single.tuning[0].key != second.key and keys(single)[0] != keys(chain)[0]
    pool = SyntheticPool(store.make(chain.pool)/"pool")
    assert [previous for _, _, _, previous, *_ in TRAINED] == [None, store.dir(first)] and len(pool) == 40
    assert (store.dir(second)/"before").read_text() == str(store.dir(first))
    assert (ToyLoRA(.1) >> ToyLoRA(.2) >> ToyLoRA(.3)).parts == (ToyLoRA(.1), ToyLoRA(.2), ToyLoRA(.3))

def test_the_work_of_a_part_gets_what_its_key_is_made_of(tmp_path):
    TRAINED.clear()
    job = plan([toy("toy", ToyLoRA())], [TASK], (0,), **{"ToyLoRA.scale": .7})[0]
    Store(tmp_path).make(job.tuning[0])
    assert TRAINED[0][0] == job.tuning[0].config["part"] == job.method.finetune == ToyLoRA(.7)
    assert settings_of(job)["ToyLoRA.scale"] == .7

@pytest.mark.parametrize("said", [{"lr": .1, "Training.lr": .2}, {"strength": .5, "SDEdit.strength": .7}])
def test_one_setting_with_two_values_is_an_error(said):
    first, second = said
    with pytest.raises(DiffDAError, match=f"{first} and {second} are one setting"):
        plan(["real-guidance"], ["nano-fashion"], [0], **said)

def test_a_qualified_name_is_the_same_setting():
    twice = {"lr": [.1], "Training.lr": [.1, None], "SDEdit.strength": [.9, None]}
    jobs_found = plan(["real-guidance"], ["nano-fashion"], [0], twice, strength=.9)
    assert len(jobs_found) == 1 and jobs_found[0].training.lr == .1
    # the classifier's own, and that of a part of the same name, are two settings
    gif, = plan(["gif"], ["nano-fashion"], [0], hflip=.5, **{"GIF.hflip": .1})
    assert gif.training.hflip == .5 and gif.method.generate.hflip == .1

@pytest.mark.parametrize("vary, said, words", [
    (["strength"], {}, "vary is a dictionary"),
    ({"strength": [.2, .4]}, {"strength": .3}, "strength is given by itself and varied"),
])
def test_an_axis_is_said_once_and_as_a_dictionary(vary, said, words):
    with pytest.raises(DiffDAError, match=words): plan(["real-guidance"], [TASK], (0,), vary=vary, **said)
