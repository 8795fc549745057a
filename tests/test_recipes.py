"The tables of settings: their form, that every row comes into force, and what the protocols change."
import json

import pandas as pd, pytest, torch

from diffda.backbone import get_backbone, settled
from diffda.core import DiffDAError, digest
from diffda.data import NANO_RECIPE, Recipe, by_recipe, get_split, get_task, list_tasks
from diffda.finetune import DreamBoothLoRA, TextualInversion
from diffda.method import get_method, list_methods
from diffda.pipeline import plan, train_stage
from diffda.recipes import PROTOCOLS, applies, by_protocol, recipe, settings
from diffda.train import _inits, new_classifier

PAPERS = ("unidiffda", "dafusion", "mvc")
ROWS = [(p, r) for p in PAPERS for r in recipe(p).itertuples()]

@pytest.mark.parametrize("paper", PAPERS)
def test_form(paper):
    t = recipe(paper)
    assert list(t.columns) == ["part", "setting", "where", "value", "code", "mark", "note"] and (t.value != "").all()
    assert set(t.mark) <= {"P", "C", "P C", "ours"} and not t.duplicated(["part", "setting", "where"]).any()
    assert (t[t.code != ""].code != t[t.code != ""].value).all()

def test_every_row_applies_to_a_task():
    "A row for a task or a family that does not exist never comes into force."
    places = [get_task(t).places for t in list_tasks()]
    for paper, r in ROWS: assert any(applies(r.where, p) for p in places), (paper, r)

def test_every_row_sets_something():
    "The value of each row that counts is what the method, the part or the classifier has at a task of that place."
    known = {"classifier": set(Recipe.__dataclass_fields__), "*": {"num_copies"}, **{m: set(get_method(m).settings) for m in list_methods()}}
    parts = {type(p).__name__: set(p.__dataclass_fields__) for m in map(get_method, list_methods()) if m.finetune for p in m.finetune.parts}
    for paper, r in ROWS: assert r.setting in {**known, **parts}[r.part], (paper, r)

@pytest.mark.parametrize("name", [m for m in list_methods() if get_method(m).recipe])
def test_the_composition_says_the_same_as_the_table(name):
    "What a reader sees in the method's notebook holds where the table makes no exception."
    m, own = get_method(name), settings(*get_method(name).recipe.split("/"))
    for k, v in own.items(): assert getattr(m, k, None) == v or getattr(m.generate, k, None) == v, (k, v)

# values by hand, from the papers
@pytest.mark.parametrize("method, task, want", [
    ("real-guidance", "caltech101", dict(strength=.9, utilize="fc", prompt="class", num_copies=5)), ("real-guidance", "aircraft-5", dict(strength=.1, utilize="grr", p=.9)),
    ("gif", "caltech101", dict(epsilon=4., strength=.9)), ("gif", "cifar100", dict(epsilon=.8)), ("gif", "blood-5", dict(epsilon=.1, strength=.3, prompt="medical")),
    ("diffusemix", "imagenet100", dict(num_inference_steps=100, blend=.2, utilize="fc")), ("diffusemix", "birds-10", dict(p=.3, utilize="grr")),
    ("da-fusion", "birds-1", dict(strength=.9, p=.7)), ("diff-aug", "skin-50", dict(strength=.3, prompt="medical", utilize="fc")), ("diff-aug", "aircraft-1", dict(p=.3, strength=.9)),
    ("diff-mix", "birds-5", dict(strength=.9, gamma=.5, p=.7, prompt="metaclass")), ("diff-mix", "domainnet", dict(prompt="domain")), ("diff-ii", "aircraft-10", dict(p=.5, inversion_steps=200)),
    ("mvc", "tiny-imagenet", dict(guidance_scale=7.5, utilize="two-phase", num_copies=4))])
def test_the_papers_settings(method, task, want):
    m = plan([method], [task], (0,))[0].method
    assert {k: getattr(m, k, getattr(m.generate, k, None)) for k in want} == want

@pytest.mark.parametrize("task, want", [("caltech101", (100, 32, .01, 1e-4, 0., "scratch")), ("cifar100", (100, 32, .1, 5e-4, 0., "scratch")), ("imagenet1k", (100, 32, .1, 1e-4, 0., "scratch")),
                                        ("birds-5", (128, 256, .1, 5e-4, .1, "imagenet")), ("birds-full", (128, 256, .1, 5e-4, .1, "scratch")), ("skin-10", (100, 32, .01, 5e-4, 0., "scratch"))])
def test_the_papers_classifiers(task, want):
    r = get_task(task).recipe
    assert (r.epochs, r.batch_size, r.lr, r.weight_decay, r.label_smoothing, r.init) == want and (r.resize, r.crop, r.pad, r.classifier) == (256, 224, 8, "resnet50")

def test_the_budget_of_fine_tuning():
    b = get_backbone("sd15")
    assert [settled(TextualInversion(), b, get_task(t)).steps for t in ("caltech101", "birds-1", "blood-5")] == [2000, 2000, 500]
    assert [settled(DreamBoothLoRA(), b, get_task(t)).steps for t in ("caltech101", "birds-1", "blood-5")] == [1000, 1000, 500]
    assert [settled(TextualInversion(), b, get_task(t)).initializer for t in ("caltech101", "birds-1", "aircraft-5", "skin-10")] == ["the", "bird", "aircraft", "the"]
    assert settled(DreamBoothLoRA(), b).lr == 5e-6 and settled(DreamBoothLoRA(steps=7), b, get_task("blood-5")).steps == 7

COMMON = dict(momentum=.9, label_smoothing=0., hflip=.5, evaluations=0)

@pytest.mark.parametrize("task, rotation, vflip", [("coco-1", 15., 0.), ("voc-4", 15., 0.), ("caltech101-full-2", 15., 0.), ("flowers102-8", 15., 0.), ("cars-16", 15., 0.), ("spurge-4", 45., .5)])
def test_da_fusions_classifier(task, rotation, vflip):
    "10000 steps of 32 images; the same whoever's protocol runs on its tasks."
    r = get_task(task).recipe
    assert r == Recipe("resnet50", "imagenet-v2", epochs=50, batch_size=32, lr=1e-4, weight_decay=0., resize=256, crop=256, pad=0, mean=(.5,)*3, std=(.5,)*3,
                       optimizer="adam", layers="last", schedule="constant", draws=6400, rotation=rotation, vflip=vflip, **COMMON)
    assert r.epochs*r.draws == 10_000*r.batch_size and all(by_recipe(get_task(task), p) == get_task(task) for p in PROTOCOLS)

def test_da_fusions_classifier_on_the_tasks_of_others():
    for t in ("birds-5", "blood-25", "tiny-imagenet"): assert by_recipe(get_task(t), "dafusion").recipe == get_task("voc-4").recipe != get_task(t).recipe
    assert plan(["baseline"], ["birds-5"], (0,), protocol="dafusion")[0].task.recipe.layers == "last" and plan(["baseline"], ["nano-digits-5"], (0,), protocol="dafusion")[0].task == get_task("nano-digits-5")

@pytest.mark.parametrize("task, want", [
    ("tiny-imagenet", Recipe("resnet50", epochs=50, batch_size=128, lr=.01, weight_decay=5e-4, resize=64, crop=64, pad=8, **COMMON)),
    ("brain-tumor", Recipe("resnet50", "imagenet", epochs=50, batch_size=32, lr=.01, weight_decay=5e-4, resize=256, crop=224, pad=8, **COMMON)),
    *((f"{d}-{part}", Recipe("wrn-28-2", epochs=200, batch_size=128, lr=.1, weight_decay=5e-4, resize=32, crop=32, pad=4, mean=mean, std=std, **COMMON)) for part in ("full", "reduced")
      for d, mean, std in (("cifar10", (.4914, .4822, .4465), (.247, .2435, .2616)), ("cifar100", (.5071, .4865, .4409), (.2673, .2564, .2762))))])
def test_mvcs_classifiers(task, want):
    assert get_task(task).recipe == want == by_recipe(get_task(task), "authors-code").recipe

def test_what_mvcs_paper_says_of_the_classifier():
    t = recipe("mvc")
    said = t[(t.part == "classifier") & (t.mark == "P")]
    assert set(zip(said.setting, said["where"], said.value)) == {("classifier", "", "resnet50"), ("classifier", "cifar*", "wrn-28-2"), ("init", "cifar*", "scratch"),
        ("epochs", "tiny-imagenet", "50"), ("batch_size", "tiny-imagenet", "128"), ("lr", "tiny-imagenet", "0.01")}

def test_every_classifier_can_be_built():
    "And `init` is among what it can start from; nothing is downloaded here."
    with torch.device("meta"):
        for r in {get_task(t).recipe for t in list_tasks("paper")}:
            assert new_classifier(r.classifier, 3) and r.init in ("scratch", *_inits(r.classifier)), r

def test_keys_of_earlier_work():
    "Recorded before the settings of DA-Fusion's classifier existed; they must be found for ever."
    assert digest(NANO_RECIPE) == "b9e213bd2de0e6e9" and digest(Recipe()) == "22ab2e58c7e95b56"
    run = plan(["baseline"], ["nano-fashion"], (0,))[0]
    assert train_stage(run, get_split("nano-fashion", 0)).key == "4a612a1579d56341"

# protocols
def test_where_print_and_code_differ():
    at = lambda m, t, protocol: plan([m], [t], (0,), protocol=protocol)[0].method
    assert [at("diff-mix", f"birds-{n}", "authors-code").generate.strength for n in (1, 5, 10)] == [.5, .7, .7]
    assert at("gif", "birds-5", "authors-code").generate.strength == .9 and at("gif", "birds-1", "authors-code").generate.target == "clip" != at("gif", "birds-1", "paper").generate.target
    tuned = at("diff-aug", "birds-1", "authors-code")
    assert tuned.generate.strength == .9 and tuned.finetune.parts[1].steps == 500 and settled(tuned.finetune.parts[0], get_backbone("sd15"), get_task("birds-1")).initializer == "bird"
    assert at("diff-aug", "aircraft-1", "authors-code").generate.strength == .1

def test_da_fusions_own_paper():
    m = plan(["da-fusion"], ["voc-4"], (0,), protocol="dafusion")[0].method
    assert (m.generate.strength, m.generate.num_copies, m.generate.num_inference_steps, m.utilize, m.p) == ((.25, .5, .75, 1.), 10, 50, "lrr", .5)
    assert (lambda p: (p.per_class, p.steps, p.batch_size, p.lr, p.scale_lr, p.initializer))(m.finetune.parts[0]) == (True, 1000, 4, 5e-4, True, "the")
    assert plan(["da-fusion"], ["spurge-4"], (0,), protocol="dafusion")[0].method.generate.num_copies == 50
    assert get_task("voc-4").backbone == "sd14"

def test_the_nano_generator_keeps_its_budget():
    m = plan(["diff-aug"], ["nano-digits-5"], (0,), protocol="authors-code")[0].method
    assert all(p.steps is None for p in m.finetune.parts) and get_task("nano-digits-5") == by_recipe(get_task("nano-digits-5"), "authors-code")

def test_what_the_user_says_counts_most():
    assert plan(["diff-mix"], ["birds-5"], (0,), protocol="authors-code", strength=.3)[0].method.generate.strength == .3

def test_faults():
    with pytest.raises(DiffDAError, match="did you mean authors-code"): plan(["gif"], ["birds-5"], (0,), protocol="author-code")
    with pytest.raises(DiffDAError, match="Unknown paper 'unidiff'"): recipe("unidiff")

def test_a_backbone_for_all_tasks():
    assert {r.task.backbone for r in plan(["gif"], ["birds-5", "caltech101"], (0,), backbone="sd21")} == {"sd21"}
