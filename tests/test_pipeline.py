"From a plan to a table: what shares a stage and what must not, what enters the training, and what is refused."
import dataclasses, json, math, shutil
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch
from PIL import Image

from diffda import data, pipeline, train
from diffda.core import DiffDAError, Store, generator_for, make_dir
from diffda.data import Recipe, get_split, get_task
from diffda.backbone import BACKBONES, LORA
from diffda.generate import SDEdit, SyntheticPool
from diffda.method import FineTune, Method, get_method, list_methods
from diffda.pipeline import adaptation_of, adaptation_stages, array_of, as_row, plan, pool_of, pool_stage, record_of, run_all, train_stage
from diffda.train import batches

TASK = dataclasses.replace(get_task("nano-scans-25"), shots=2, val_per_class=2)
TASK = dataclasses.replace(TASK, recipe=dataclasses.replace(TASK.recipe, epochs=2, evaluations=2, batch_size=8))
QUICK = dict(strength=.5, num_inference_steps=4, num_copies=2)
COLUMNS = {"method", "title", "task", "counterpart", "scale", "family", "seed", "utilize", "p", "strength", "num_copies", "equal", "top1", "top5", "best_val",
           "best_test", "per_class", "seconds", "pool", "n_real", "n_synthetic", "steps"}

def one(method="real-guidance", task=TASK, seed=0, **changes): return plan([method], [task], (seed,), **{**QUICK, **changes})[0]
def keys(run):
    split = get_split(run.task, run.seed)
    pool = pool_stage(run, split)
    return pool and pool.key, train_stage(run, split).key

@pytest.fixture(scope="module")
def full(tmp_path_factory):
    "A store in which the baseline and Real Guidance with full concatenation are done."
    store = Store(tmp_path_factory.mktemp("store"))
    return store, run_all(plan(["baseline", "real-guidance"], [TASK], (0,), **QUICK), store, progress=False)

@pytest.fixture
def copied(full, tmp_path): return Store(shutil.copytree(full[0].root, tmp_path/"store"))

# keys

POOL = {"strength": .7, "num_inference_steps": 6, "num_copies": 3, "guidance_scale": BACKBONES["nano"].guidance_scale + 1, "prompt": "article"}

@pytest.mark.parametrize("name, value", POOL.items())
def test_settings_of_the_generation_change_both_keys(name, value):
    a, b = keys(one()), keys(one(**{name: value}))
    assert a[0] != b[0] and a[1] != b[1]

def test_guidance_zero_is_not_the_default_guidance():
    assert keys(one(guidance_scale=0.))[0] != keys(one())[0]

@pytest.mark.parametrize("changed", [dict(task=dataclasses.replace(TASK, shots=3)), dict(seed=1), dict(task=dataclasses.replace(TASK, val_per_class=3))], ids=["shots", "seed", "validation"])
def test_other_images_change_all_keys(changed):
    for method in ("real-guidance", "baseline"): assert all(a != b for a, b in zip(keys(one(method)), keys(one(method, **changed))) if a)

RECIPE = {"classifier": "resnet50", "init": "nano-fashion", "epochs": 3, "batch_size": 9, "lr": .2, "weight_decay": .2, "momentum": .2, "label_smoothing": .2, "resize": 40,
          "crop": 28, "pad": 3, "hflip": .2, "mean": (.1,)*3, "std": (.1,)*3, "evaluations": 1,
          "optimizer": "adam", "layers": "last", "schedule": "constant", "draws": 9, "rotation": 5., "vflip": .2}

def test_every_field_of_a_recipe_is_tried(): assert set(RECIPE) == {f.name for f in dataclasses.fields(Recipe)}

@pytest.mark.parametrize("name, value", RECIPE.items())
def test_settings_of_the_training_change_its_key_only(name, value):
    other = dataclasses.replace(TASK, recipe=dataclasses.replace(TASK.recipe, **{name: value}))
    a, b = keys(one()), keys(one(task=other))
    assert a[0] == b[0] and a[1] != b[1]

@pytest.mark.parametrize("changes", [dict(utilize="fr"), dict(utilize="grr"), dict(augment="mixup"), dict(epochs=7)], ids=str)
def test_use_changes_the_key_of_the_training_only(changes):
    a, b = keys(one()), keys(one(**changes))
    assert a[0] == b[0] and a[1] != b[1]

@pytest.mark.parametrize("strategy, matters", [("fc", False), ("fr", False), ("lrr", True), ("grr", True)])
def test_p_matters_where_images_are_replaced_at_random(strategy, matters):
    a, b = keys(one(utilize=strategy, p=.2)), keys(one(utilize=strategy, p=.6))
    assert a[0] == b[0] and (a[1] != b[1]) == matters

def test_what_does_not_matter_changes_no_key():
    default = keys(one())
    assert keys(one(guidance_scale=BACKBONES["nano"].guidance_scale)) == default
    assert keys(one(task=dataclasses.replace(TASK, name="other", counterpart="other", family="conventional"))) == default
    assert keys(one(dataclasses.replace(get_method("real-guidance"), name="other", title="Other"))) == default
    assert keys(one(equal="steps")) == default                           # full concatenation is the yardstick itself
    assert keys(one(strength=1)) == keys(one(strength=1.)) != default
    base = keys(one("baseline"))
    for changes in (dict(p=.9), dict(num_copies=9), dict(strength=.1), dict(utilize="grr")): assert keys(one("baseline", **changes)) == base

def test_methods_without_images_have_keys_of_their_own():
    assert len({keys(one(m))[1] for m in ("baseline", "mixup", "cutmix", "randaugment", "autoaugment", "real-guidance")}) == 6
    assert all(keys(one(m))[0] is None for m in ("baseline", "mixup", "cutmix", "randaugment", "autoaugment"))

def test_epochs_of_a_fixed_size_are_equal_steps_for_all():
    task = dataclasses.replace(TASK, recipe=dataclasses.replace(TASK.recipe, draws=20))
    for m in ("baseline", "real-guidance"):
        assert one(m, task, equal="steps").recipe(20) == task.recipe and pipeline.images_seen(one(m, task), 20) == 20*task.recipe.epochs

def test_other_starting_weights_change_the_key(tmp_path, monkeypatch):
    "A classifier that starts from a net of the nano world is another one when that net is built anew."
    task = dataclasses.replace(TASK, recipe=dataclasses.replace(TASK.recipe, init="nano-fashion"))
    before, scratch = keys(one("baseline", task)), keys(one("baseline"))
    world = tmp_path/"world"; (world/"classifiers").mkdir(parents=True)
    from safetensors.torch import save_file
    for n in train.NANO_NETS: save_file({k: v + 1 for k, v in train.nano_weights(n).items()}, world/"classifiers"/f"{n}.safetensors")
    for module in (data, train, pipeline):
        if hasattr(module, "NANO_WORLD"): monkeypatch.setattr(module, "NANO_WORLD", world)
    assert keys(one("baseline", task))[1] != before[1] and keys(one("baseline"))[1] == scratch[1]

# the tables share their stages

def test_tables_2_8_and_9_share_what_they_have_in_common():
    task, seeds = get_task("nano-fashion"), (0, 1, 2)
    t2 = plan(["baseline", "mixup", "cutmix", "real-guidance"], [task], seeds, utilize="fc", num_copies=5, epochs=None)
    t2 += plan(["baseline"], [task], seeds, equal="steps", utilize="fc", num_copies=5, epochs=None)
    t8 = plan(["baseline"], [task], seeds, num_copies=5, equal="epochs", epochs=None)
    for u in ("fc", "fr", "lrr", "grr"): t8 += plan(["real-guidance"], [task], seeds, utilize=u, p=.5, num_copies=5, equal="epochs", epochs=None)
    t9 = plan(["baseline"], [task], seeds, utilize="fc", num_copies=5, epochs=None)
    for s in (.1, .3, .5, .7, .9): t9 += plan(["real-guidance"], [task], seeds, strength=s, utilize="fc", num_copies=5, epochs=None)
    pools, nets = ([{keys(r)[i] for r in t} - {None} for t in (t2, t8, t9)] for i in (0, 1))
    assert [len(p) for p in pools] == [3, 3, 15] and pools[0] == pools[1] and pools[0] < pools[2] and len(set().union(*pools)) == 15
    # baseline, Mixup, CutMix, Real Guidance, baseline at equal steps; three more strategies; four more strengths; three seeds each
    assert [len(n) for n in nets] == [15, 15, 18] and len(set().union(*nets)) == 3*(5 + 3 + 4)
    assert len(nets[0] & nets[1]) == len(nets[0] & nets[2]) == len(nets[1] & nets[2]) == 3*2

def test_a_run_stands_in_a_plan_once():
    assert len(plan(["baseline", "baseline"], [TASK, TASK], (0, 0, 1))) == 2

# equal steps

def steps_of(run):
    "The optimiser steps of a run, from the settings that its stage is made of."
    split = get_split(run.task, run.seed)
    n, m, r = len(split.train), getattr(run.method.generate, "num_copies", 0), train_stage(run, split).config["recipe"]
    epoch = len(batches(torch.arange({"fc": n*(1 + m), "fr": n*m}.get(run.method.utilize, n) if m else n), r.batch_size))
    return epoch*r.epochs, epoch

@pytest.mark.parametrize("task", ["nano-fashion", "nano-fashion-100", "nano-digits-1", "nano-digits-5", "nano-scans-25"])
@pytest.mark.parametrize("copies", [1, 5])
def test_equal_steps_are_as_many_as_full_concatenation_takes(task, copies):
    full = steps_of(plan(["real-guidance"], [task], (0,), utilize="fc", num_copies=copies)[0])[0]
    for method, changes in (("baseline", {}), ("mixup", {}), *(("real-guidance", {"utilize": u}) for u in ("fc", "fr", "lrr", "grr"))):
        total, epoch = steps_of(plan([method], [task], (0,), equal="steps", num_copies=copies, **changes)[0])
        assert abs(total - full) < epoch, (method, changes, total, full)

def test_steps_of_the_record_are_those_counted(full):
    store, records = full
    assert records.steps.tolist() == [steps_of(one("baseline"))[0], steps_of(one())[0]] == [2*math.ceil(20/8), 2*math.ceil(60/8)]

# a record

def test_columns_and_numbers(full):
    records = full[1]
    assert COLUMNS <= set(records.columns) and records.method.tolist() == ["baseline", "real-guidance"]
    assert records.n_real.tolist() == [20, 20] and records.n_synthetic.tolist() == [0, 40] and records.utilize.tolist() == ["none", "fc"]
    assert records.pool.isna().tolist() == [True, False] and len(SyntheticPool(records.pool[1])) == 40

def test_top1_is_the_last_epoch_and_never_the_best_on_the_test_images(full):
    store, records = full
    for r, run in zip(records.itertuples(), (one("baseline"), one())):
        record, history = record_of(run, store, progress=False), json.loads((store.dir(train_stage(run, get_split(TASK, 0)))/"history.json").read_text())
        assert r.top1 == record["last"]["top1"] == history[-1]["test"]["top1"] and record["last"]["epoch"] == 2
        assert r.best_test == max(h["test"]["top1"] for h in history) and r.best_val == max(history, key=lambda h: h["val"]["top1"])["test"]["top1"]
    worse = {**record, "last": {**record["last"], "top1": 11.}, "best_test": {**record["best_test"], "top1": 99.}, "best_val": {**record["best_val"], "top1": 55.}}
    row = as_row(worse, one())
    assert (row["top1"], row["best_val"], row["best_test"]) == (11., 55., 99.)
    assert math.isnan(as_row({**worse, "best_val": None}, one())["best_val"])

def test_a_record_says_what_it_was_made_of(full):
    store, records = full
    record = record_of(one(), store, progress=False)
    assert record["split_digest"] == get_split(TASK, 0).digest and record["pool_digest"] == SyntheticPool(record["pool"]).digest() and record["seed"] == 0
    assert record["config"]["method"]["generate"]["strength"] == .5 and record["config"]["task"]["recipe"]["epochs"] == 2
    assert (store.dir(train_stage(one(), get_split(TASK, 0)))/"environment.json").exists()

def test_a_second_run_makes_nothing(full, monkeypatch):
    store, records = full
    for f in ("generate_pool", "fit", "write_array"): monkeypatch.setattr(pipeline, f, lambda *a, **k: pytest.fail("made again"))
    again = run_all(plan(["baseline", "real-guidance"], [TASK], (0,), **QUICK), str(store.root), progress=False)
    pd.testing.assert_frame_equal(again, records)

def test_another_store_gives_the_same_record(full, tmp_path):
    store, records = full
    again = run_all(plan(["real-guidance"], [TASK], (0,), **QUICK), tmp_path/"other", progress=False)
    same = [c for c in records.columns if c not in ("pool", "seconds")]
    pd.testing.assert_frame_equal(again[same], records[same].iloc[1:].reset_index(drop=True))

def test_other_settings_do_not_find_the_old_pool(full):
    store, records = full
    more = run_all(plan(["real-guidance"], [TASK], (0,), **{**QUICK, "num_copies": 1}), store, progress=False)
    assert more["pool"][0] != records["pool"][1] and more.n_synthetic[0] == 20 and len(SyntheticPool(records["pool"][1])) == 40

def test_estimate_counts_stages(full, capsys):
    run_all(plan(["baseline", "real-guidance"], [TASK], (0,), **QUICK), full[0])
    assert "To do: 0 x generate, 0 x train (nothing to do); 3 of 3 stages" in capsys.readouterr().out

# what the classifier gets

@dataclasses.dataclass(frozen=True)
class Softened(SDEdit):
    "SDEdit whose images count for a quarter as the class after their own."
    def rows(self, split, *args):
        k = len(split.class_names)
        return [{**r, "label_weights": [{"label": r["label"], "weight": .75}, {"label": (r["label"] + 1)%k, "weight": .25}]} for r in super().rows(split, *args)]

@dataclasses.dataclass(frozen=True)
class Nothing(SDEdit):
    "A part that makes no image."
    def rows(self, *args): return []

@pytest.mark.parametrize("utilize", ["grr", "fc"])
def test_synthetic_images_come_with_the_labels_of_their_own_rows(tmp_path, monkeypatch, utilize):
    seen, fit = {}, pipeline.fit
    def spy(net, images, weights, owners, *a, **k): seen.update(images=images, weights=weights, owners=owners, **k); return fit(net, images, weights, owners, *a, **k)
    monkeypatch.setattr(pipeline, "fit", spy)
    store, run = Store(tmp_path), one(Method("soft", "Soft", generate=Softened(**QUICK), utilize=utilize))
    record_of(run, store, progress=False)
    pool, split = pool_of(run, store), get_split(TASK, 0)
    images = np.concatenate([np.asarray(a) for a in seen["images"]])
    assert seen["utilize"] == utilize and images.shape == (60, 3, 32, 32) and seen["weights"].shape == (60, 10)
    for i in range(20):
        assert np.array_equal(images[i].transpose(1, 2, 0), np.asarray(split.train.read(i))) and seen["weights"][i].tolist() == np.eye(10)[split.train.labels[i]].tolist()
    for j, r in enumerate(pool.rows.itertuples()):
        assert np.array_equal(images[20 + j].transpose(1, 2, 0), np.asarray(pool.image(j)))
        expected = np.zeros(10); expected[r.source_label] = .75; expected[(r.source_label + 1)%10] = .25
        assert np.allclose(seen["weights"][20 + j], expected) and split.train.ids[seen["owners"][j]] == r.source_id

@pytest.mark.parametrize("utilize", ["fc", "grr"])
def test_a_method_that_adds_nothing_is_an_error(tmp_path, utilize):
    store, run = Store(tmp_path), one(Method("nothing", "Nothing", generate=Nothing(**QUICK), utilize=utilize))
    with pytest.raises(DiffDAError, match="empty; a method that adds nothing"): record_of(run, store, progress=False)
    assert not store.done(train_stage(run, get_split(TASK, 0)))

# damage

def of_grr(store): return one(utilize="grr"), store.dir(pool_stage(one(), get_split(TASK, 0)))

def edit(folder, change):
    meta = folder/"pool"/"metadata.jsonl"
    rows = [json.loads(l) for l in meta.read_text().splitlines()]
    meta.write_text("".join(json.dumps(r) + "\n" for r in change(rows)))

def kept(store): return {p: p.stat().st_mtime_ns for p in store.root.rglob("*") if p.is_file() and p.name in ("DONE", "record.json", "images.npy")}

def test_altered_metadata_is_refused(copied):
    run, folder = of_grr(copied)
    before = kept(copied)
    edit(folder, lambda rows: [{**r, "source_id": "elsewhere-1"} if i == 7 else r for i, r in enumerate(rows)])
    with pytest.raises(DiffDAError, match="metadata.jsonl is not what was written there. Delete .*DONE and run again"): run_all([run], copied, progress=False)
    assert all(p.exists() and p.stat().st_mtime_ns == t for p, t in before.items())

def test_a_store_can_be_moved(full, tmp_path):
    store = Store(shutil.copytree(full[0].root, tmp_path/"elsewhere"))
    run = plan(["real-guidance"], [TASK], (0,), **QUICK)[0]
    pool = run_all([run], store, progress=False)["pool"][0]
    assert Path(pool).is_relative_to(store.root) and len(SyntheticPool(pool))

def test_incomplete_weights_are_refused(tmp_path):
    store, run = Store(tmp_path), plan([toy("lora", ToyLoRA())], [TASK], (0,))[0]
    folder = adaptation_of(run, get_split(TASK, 0), store)
    (folder/LORA).unlink()
    with pytest.raises(DiffDAError, match=f"{LORA} is missing. Delete the folder and run again"): adaptation_of(run, get_split(TASK, 0), store)

def test_a_pool_with_another_number_of_rows_is_refused(copied):
    run, folder = of_grr(copied)
    before = kept(copied)
    edit(folder, lambda rows: rows[:-1])
    with pytest.raises(DiffDAError, match="lists 39 images where 40 were made. Delete .*DONE and run again"): run_all([run], copied, progress=False)
    assert all(p.exists() and p.stat().st_mtime_ns == t for p, t in before.items())
    (folder/"DONE").unlink()                                             # what the sentence says
    assert run_all([run], copied, progress=False).n_synthetic[0] == 40

def test_a_damaged_image_is_named_and_its_advice_works(copied):
    run, folder = of_grr(copied)
    pool = SyntheticPool(folder/"pool")
    digest, path = pool.digest(), folder/"pool"/pool.rows.file_name[5]
    for array in (copied.root/"array").iterdir():                        # the pool has not been decoded yet
        if json.loads((array/"stage.json").read_text())["config"]["what"] == "pool": shutil.rmtree(array)
    before = kept(copied)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(DiffDAError, match=f"{path} is damaged. Delete it and .*DONE, then run again"): run_all([run], copied, progress=False)
    assert all(p.exists() and p.stat().st_mtime_ns == t for p, t in before.items())
    path.unlink(); (folder/"DONE").unlink()
    run_all([run], copied, progress=False)
    assert SyntheticPool(folder/"pool").digest() == digest

def test_an_unwritable_store(tmp_path):
    (tmp_path/"file").write_text("")
    with pytest.raises(DiffDAError, match="Cannot write .*file"): run_all([one("baseline")], tmp_path/"file"/"store", progress=False)

# plans that cannot be

@pytest.mark.parametrize("args, says", [((["real-guidence"], [TASK]), "did you mean real-guidance"), ((["baseline"], ["nano-fasion"]), "did you mean .*nano-fashion"),
                                        (([], [TASK]), "Nothing to run"), ((["baseline"], []), "Nothing to run"), ((["baseline"], [TASK], ()), "Nothing to run")])
def test_names(args, says):
    with pytest.raises(DiffDAError, match=says): plan(*args)

@pytest.mark.parametrize("changes, says", [(dict(stength=.5), "Unknown setting 'stength': did you mean strength"), (dict(strength=0.), "strength lies in"), (dict(p=1.5), "found 1.5"), (dict(utilize="xx"), "utilization strategy"),
                                           (dict(equal="time"), "equal"), (dict(augment="mixap"), "did you mean mixup"), (dict(strength=.1, num_inference_steps=5), "0 steps")])
def test_settings(changes, says):
    with pytest.raises(DiffDAError, match=says): plan(["real-guidance"], [TASK], **changes)

def test_a_setting_of_a_method_that_another_call_plans():
    "A table plans its methods in several calls with the same changes; what one of them lacks is not unknown."
    assert plan(["baseline"], [TASK], (0,), epsilon=.5) == plan(["baseline"], [TASK], (0,)) and plan(["gif"], [TASK], (0,), epsilon=.5)[0].method.generate.epsilon == .5

def test_an_array_of_another_pool_is_not_taken(store):
    read = lambda i: Image.new("RGB", (8, 8))
    array_of("pool", "key", 3, read, 8, store)
    with pytest.raises(DiffDAError, match="holds 3 images where there are 4 now; delete .* and run again"): array_of("pool", "key", 4, read, 8, store)

def test_overrides_by_family_and_task_and_then_by_hand():
    rg = get_method("real-guidance")
    assert (rg.at(get_task("nano-fashion")).generate.strength, rg.at(get_task("nano-fashion")).utilize) == (.9, "fc")
    few = rg.at(get_task("nano-digits-5"))
    assert (few.generate.strength, few.utilize, few.p, few.overrides) == (.1, "grr", .1, {})
    assert (rg.at(get_task("nano-digits-5"), strength=.4, p=None).generate.strength, rg.at(get_task("nano-digits-5"), p=.9).p) == (.4, .9)

@pytest.mark.parametrize("name", list_methods())
def test_every_method_plans_on_every_task(name):
    for t in data.list_tasks(): assert plan([name], [t], (0,))[0].method.name == name

# fine-tuning parts

TRAINED = []

def write_lora(folder, scale, seed):
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict
    unet = UNet2DConditionModel.from_pretrained(BACKBONES["nano"].source, subfolder="unet")
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    g = generator_for(seed, "toy lora")
    for n, w in unet.named_parameters():
        if "lora_" in n: w.data = torch.randn(w.shape, generator=g)*scale
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(unet)))

@dataclasses.dataclass(frozen=True)
class ToyLoRA(FineTune):
    scale: float = .3
    def train(self, split, backbone, previous, folder, seed):
        TRAINED.append((self, split.digest, backbone, previous, folder, seed))
        if previous: (folder/"before").write_text(str(previous))
        write_lora(folder, self.scale, seed)
        return {"rank": 2}

def toy(name, finetune, **kw): return Method(name, name, finetune=finetune, generate=SDEdit(**QUICK), **kw)

def test_two_methods_share_what_was_fine_tuned(full, tmp_path):
    TRAINED.clear()
    store, split = Store(tmp_path), get_split(TASK, 0)
    a, b, c = (plan([m], [TASK], (0,))[0] for m in (toy("a", ToyLoRA()), toy("b", ToyLoRA(), utilize="grr", augment="mixup"), dataclasses.replace(toy("c", ToyLoRA()), generate=SDEdit(**{**QUICK, "num_copies": 1}))))
    stages = [[s.key for _, s in adaptation_stages(r, split)] for r in (a, b, c)]
    assert stages[0] == stages[1] == stages[2] and len(stages[0]) == 1
    assert keys(a)[0] == keys(b)[0] != keys(c)[0] and len({keys(r)[1] for r in (a, b, c)}) == 3
    pools = [pool_of(r, store, progress=False) for r in (a, b, c)]
    folder = store.dir(adaptation_stages(a, split)[0][1])
    assert len(TRAINED) == 1 and TRAINED[0] == (ToyLoRA(), split.digest, "nano", None, folder, 0) and (folder/LORA).exists()
    plain = SyntheticPool(full[1]["pool"][1])
    assert pools[0].folder == pools[1].folder and pools[0].rows.prompt.equals(plain.rows.prompt)
    assert any(not np.array_equal(np.asarray(pools[0].image(i)), np.asarray(plain.image(i))) for i in range(40))
    record = record_of(a, store, progress=False)
    assert record["n_synthetic"] == 40 and record["config"]["method"]["finetune"]["scale"] == .3 and len(TRAINED) == 1

def test_keys_follow_the_fine_tuning():
    split = get_split(TASK, 0)
    run = lambda part, seed=0: plan([toy("t", part)], [TASK], (seed,))[0]
    stage = lambda r: [s.key for _, s in adaptation_stages(r, get_split(TASK, r.seed))]
    base = run(ToyLoRA())
    assert keys(run(ToyLoRA(.4)))[0] != keys(base)[0] != keys(run(None))[0] == keys(one())[0]
    assert stage(run(ToyLoRA(.4))) != stage(base) != stage(run(ToyLoRA(), 1))
    assert adaptation_stages(run(None), split) == []

def test_a_chain_hands_on_what_was_learned(tmp_path):
    TRAINED.clear()
    store, split = Store(tmp_path), get_split(TASK, 0)
    chain = plan([toy("chain", ToyLoRA(.1) >> ToyLoRA(.2))], [TASK], (0,))[0]
    (p1, s1), (p2, s2) = adaptation_stages(chain, split)
    assert (p1, p2) == (ToyLoRA(.1), ToyLoRA(.2)) and s2.inputs == (s1.key,)
    assert adaptation_stages(plan([toy("first", ToyLoRA(.1))], [TASK], (0,))[0], split)[0][1].key == s1.key
    single = plan([toy("second", ToyLoRA(.2))], [TASK], (0,))[0]
    assert adaptation_stages(single, split)[0][1].key != s2.key and keys(single)[0] != keys(chain)[0]
    pool = pool_of(chain, store, progress=False)
    assert [t[3] for t in TRAINED] == [None, store.dir(s1)] and (store.dir(s2)/"before").read_text() == str(store.dir(s1)) and len(pool) == 40
    assert (ToyLoRA(.1) >> ToyLoRA(.2) >> ToyLoRA(.3)).parts == (ToyLoRA(.1), ToyLoRA(.2), ToyLoRA(.3))
