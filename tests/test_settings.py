"The tables of settings: their form, that every row comes into force, and what the protocols change."
import dataclasses

import pytest, torch

from diffda.backbone import get_backbone
from diffda.classifiers import initialisations, new_classifier
from diffda.core import DiffDAError, digest
from diffda.data import NANO_TRAINING, Training, get_task, list_tasks, trained_as
from diffda.finetune import DreamBoothLoRA, TextualInversion
from diffda.generate import SDEdit
from diffda.jobs import plan
from diffda.method import flat, get_method, known_settings, list_methods
from diffda.settings import PROTOCOLS, Part, applies, by_protocol, recipe, setting, settings, settled
from diffda.utilize import STRATEGIES

PAPERS = ("unidiffda", "dafusion", "mvc")
ROWS = [(paper, row) for paper in PAPERS for row in recipe(paper).itertuples()]

def method_at(method, task, **said): return plan([method], [task], (0,), **said)[0].method

@pytest.mark.parametrize("paper", PAPERS)
def test_form(paper):
    table = recipe(paper)
    assert list(table.columns) == ["part", "setting", "where", "value", "code", "mark", "note"]
    assert (table.value != "").all() and set(table.mark) <= {"P", "C", "P C", "ours"}
    assert not table.duplicated(["part", "setting", "where"]).any()
    differing = table[table.code != ""]
    assert (differing.code != differing.value).all()

def test_every_row_applies_to_a_task():
    "A row for a task or a family that does not exist never comes into force."
    places = [get_task(name).scope for name in list_tasks()]
    for paper, row in ROWS: assert any(applies(row.where, p) for p in places), (paper, row)

def test_every_row_sets_something():
    "The setting of each row is one that the method, the part or the classifier has."
    methods = {}
    for name in list_methods():
        method = get_method(name)
        # a row may call a setting of the generation part by its field's own name
        methods[name] = known_settings(method) | set(method.generate.fields() if method.generate else ())
    chains = [m.finetune for m in map(get_method, list_methods()) if m.finetune]
    parts = {type(part).__name__: set(part.fields()) for chain in chains for part in chain.parts}
    training = {f.name for f in dataclasses.fields(Training)}
    known = {"classifier": training, "*": {"num_copies"}, **methods, **parts}
    for paper, row in ROWS: assert row.setting in known[row.part], (paper, row)

@pytest.mark.parametrize("name", [m for m in list_methods() if get_method(m).recipe])
def test_the_composition_says_the_same_as_the_table(name):
    "What a reader sees in the method's notebook holds where the table makes no exception."
    method = get_method(name)
    own = settings(*method.recipe.split("/"))
    said = {**flat(method), **{field: getattr(method.generate, field) for field in method.generate.fields()}}
    # p of a strategy that is not the method's own, such as MVC's second choice
    others = {("p", strategy().p) for strategy in STRATEGIES.discover().values() if "p" in strategy.fields()}
    for key, value in own.items(): assert said.get(key) == value or (key, value) in others, (key, value)

# values by hand, from the papers
SETTINGS = [
    ("real-guidance", "caltech101", dict(strength=.9, utilize="fc", prompt="class", num_copies=5)),
    ("real-guidance", "aircraft-5", dict(strength=.1, utilize="grr", p=.9)),
    ("gif", "caltech101", dict(epsilon=4., strength=.9)),
    ("gif", "cifar100", dict(epsilon=.8)),
    ("gif", "blood-5", dict(epsilon=.1, strength=.3, prompt="medical")),
    ("diffusemix", "imagenet100", dict(num_inference_steps=100, blend=.2, utilize="fc")),
    ("diffusemix", "birds-10", dict(p=.3, utilize="grr")),
    ("da-fusion", "birds-1", dict(strength=.9, p=.7)),
    ("diff-aug", "skin-50", dict(strength=.3, prompt="medical", utilize="fc")),
    ("diff-aug", "aircraft-1", dict(p=.3, strength=.9)),
    ("diff-mix", "birds-5", dict(strength=.9, gamma=.5, p=.7, prompt="metaclass")),
    ("diff-mix", "domainnet", dict(prompt="domain")),
    ("diff-ii", "aircraft-10", dict(p=.5, inversion_steps=200)),
    ("mvc", "tiny-imagenet", dict(guidance_scale=7.5, utilize="two-phase", num_copies=4))]

@pytest.mark.parametrize("method, task, want", SETTINGS)
def test_the_papers_settings(method, task, want):
    found = flat(method_at(method, task))
    assert {key: found[key] for key in want} == want

CLASSIFIERS = [
    ("caltech101", (100, 32, .01, 1e-4, 0., "scratch")), ("cifar100", (100, 32, .1, 5e-4, 0., "scratch")),
    ("imagenet1k", (100, 32, .1, 1e-4, 0., "scratch")), ("birds-5", (128, 256, .1, 5e-4, .1, "imagenet")),
    ("birds-full", (128, 256, .1, 5e-4, .1, "scratch")), ("skin-10", (100, 32, .01, 5e-4, 0., "scratch"))]

@pytest.mark.parametrize("task, want", CLASSIFIERS)
def test_the_papers_classifiers(task, want):
    r = get_task(task).training
    assert (r.epochs, r.batch_size, r.lr, r.weight_decay, r.label_smoothing, r.init) == want
    assert (r.resize, r.crop, r.pad, r.classifier) == (224, 224, 8, "resnet50")
    assert trained_as(get_task(task), "authors-code").training.resize == 256

def test_the_budget_of_fine_tuning():
    b, tasks = get_backbone("sd15"), ("caltech101", "birds-1", "blood-5")
    def at(part, task): return settled(part, b, get_task(task))
    assert [at(TextualInversion(), task).steps for task in tasks] == [2000, 2000, 500]
    assert [at(DreamBoothLoRA(), task).steps for task in tasks] == [1000, 1000, 500]
    tasks = ("caltech101", "birds-1", "aircraft-5", "skin-10")
    words = [at(TextualInversion(), task).initializer for task in tasks]
    # "metaclass" is the word that stands after the class name in the task's prompts
    assert words == ["the", "metaclass", "metaclass", "the"]
    assert [get_task(name).metaclass for name in ("birds-1", "aircraft-5")] == ["bird", "aircraft"]
    assert settled(DreamBoothLoRA(), b).lr == 5e-6 and at(DreamBoothLoRA(steps=7), "blood-5").steps == 7

COMMON = dict(momentum=.9, label_smoothing=0., hflip=.5, evaluations=0)
OF_DA_FUSION = [("coco-1", 15., 0.), ("voc-4", 15., 0.), ("caltech101-full-2", 15., 0.),
                ("flowers102-8", 15., 0.), ("cars-16", 15., 0.), ("spurge-4", 45., .5)]

@pytest.mark.parametrize("task, rotation, vflip", OF_DA_FUSION)
def test_da_fusions_classifier(task, rotation, vflip):
    "10000 steps of 32 images; the same whoever's protocol runs on its tasks."
    r = get_task(task).training
    assert r == Training("resnet50", "imagenet-v2", epochs=50, batch_size=32, lr=1e-4, weight_decay=0.,
                         resize=256, crop=256, pad=0, mean=(.5,)*3, std=(.5,)*3, optimizer="adam",
                         layers="last", schedule="constant", draws=6400, rotation=rotation, vflip=vflip,
                         **COMMON)
    assert r.epochs*r.draws == 10_000*r.batch_size
    assert all(trained_as(get_task(task), p) == get_task(task) for p in PROTOCOLS)

def test_da_fusions_classifier_on_the_tasks_of_others():
    theirs = get_task("voc-4").training
    for task in map(get_task, ("birds-5", "blood-25", "tiny-imagenet")):
        assert trained_as(task, "dafusion").training == theirs != task.training
    birds, digits = plan(["baseline"], ["birds-5", "nano-digits-5"], (0,), protocol="dafusion")
    assert birds.task.training.layers == "last" and digits.task == get_task("nano-digits-5")

STATISTICS = [("cifar10", (.4914, .4822, .4465), (.247, .2435, .2616)),
              ("cifar100", (.5071, .4865, .4409), (.2673, .2564, .2762))]

def _cifar(mean, std):
    return Training("wrn-28-2", epochs=200, batch_size=128, lr=.1, weight_decay=5e-4, resize=32, crop=32,
                    pad=4, mean=mean, std=std, **COMMON)

OF_MVC = [
    ("tiny-imagenet", Training("resnet50", epochs=50, batch_size=128, lr=.01, weight_decay=5e-4, resize=64,
                               crop=64, pad=8, **COMMON)),
    ("brain-tumor", Training("resnet50", "imagenet", epochs=50, batch_size=32, lr=.01, weight_decay=5e-4,
                             resize=256, crop=224, pad=8, **COMMON)),
    *((f"{data}-{part}", _cifar(*both)) for part in ("full", "reduced") for data, *both in STATISTICS)]

@pytest.mark.parametrize("task, want", OF_MVC)
def test_mvcs_classifiers(task, want):
    assert get_task(task).training == want == trained_as(get_task(task), "authors-code").training

def test_what_mvcs_paper_says_of_the_classifier():
    table = recipe("mvc")
    said = table[(table.part == "classifier") & (table.mark == "P")]
    assert set(zip(said.setting, said["where"], said.value)) == {
        ("classifier", "", "resnet50"), ("classifier", "cifar*", "wrn-28-2"), ("init", "cifar*", "scratch"),
        ("epochs", "tiny-imagenet", "50"), ("batch_size", "tiny-imagenet", "128"),
        ("lr", "tiny-imagenet", "0.01")}

def test_every_classifier_can_be_built():
    "And `init` is among what it can start from; nothing is downloaded here."
    with torch.device("meta"):
        for r in {get_task(name).training for name in list_tasks("paper")}:
            assert new_classifier(r.classifier, 3), r
            assert r.init in ("scratch", *initialisations(r.classifier)), r

# protocols

def test_where_print_and_code_differ():
    def at(method, task, protocol): return method_at(method, task, protocol=protocol)
    strengths = [at("diff-mix", f"birds-{n}", "authors-code").generate.strength for n in (1, 5, 10)]
    assert strengths == [.5, .7, .7] and at("gif", "birds-5", "authors-code").generate.strength == .9
    targets = [at("gif", "birds-1", protocol).generate.target for protocol in ("authors-code", "paper")]
    assert targets[0] == "clip" != targets[1]
    tuned = at("diff-aug", "birds-1", "authors-code")
    words, lora = tuned.finetune.parts
    assert tuned.generate.strength == .9 and lora.steps == 500 and words.initializer == "metaclass"
    assert at("diff-aug", "aircraft-1", "authors-code").generate.strength == .1

def test_da_fusions_own_paper():
    m = method_at("da-fusion", "voc-4", protocol="dafusion")
    drawing, words = m.generate, m.finetune.parts[0]
    assert (drawing.strength, drawing.num_copies, drawing.num_inference_steps) == ((.25, .5, .75, 1.), 10, 50)
    assert (m.utilize.name, m.utilize.p) == ("lrr", .5)
    assert (words.per_class, words.steps, words.batch_size, words.lr) == (True, 1000, 4, 5e-4)
    assert (words.scale_lr, words.initializer) == (True, "the")
    assert method_at("da-fusion", "spurge-4", protocol="dafusion").generate.num_copies == 50
    assert get_task("voc-4").backbone == "sd14"

def test_the_nano_generator_keeps_its_budget():
    task = get_task("nano-digits-5")
    by_code, by_print = (method_at("diff-aug", task, protocol=p).finetune for p in ("authors-code", "paper"))
    parts, nano = (TextualInversion(), DreamBoothLoRA()), get_backbone("nano")
    small = [settled(part, nano, task).steps for part in parts]
    assert [part.steps for part in by_code.parts] == [part.steps for part in by_print.parts] == small
    assert task == trained_as(task, "authors-code")

def test_what_the_user_says_counts_most():
    assert method_at("diff-mix", "birds-5", protocol="authors-code", strength=.3).generate.strength == .3

def test_faults():
    with pytest.raises(DiffDAError, match="did you mean authors-code"):
        plan(["gif"], ["birds-5"], (0,), protocol="author-code")
    with pytest.raises(DiffDAError, match="Unknown paper 'unidiff'"): recipe("unidiff")
    with pytest.raises(DiffDAError, match="Unknown protocol"): by_protocol("unidiffda", "*", protocol="mine")

def test_a_backbone_for_all_tasks():
    jobs = plan(["gif"], ["birds-5", "caltech101"], (0,), backbone="sd21")
    assert {job.task.backbone for job in jobs} == {job.backbone.name for job in jobs} == {"sd21"}

# parts

@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuned(Part):
    "A part with one setting of each sort."
    steps: int = setting(None, "[1, inf)", needed=True, small={"medical": 3, "": 2})
    rate: float = setting(.1, "(0, 1]")
    guidance_scale: float = setting(backbone=True)
    word: str = setting("a", choices=("a", "b"))
    rates: float = setting(.5, "(0, 1]", many=True)

def test_settings_are_brought_into_their_types():
    part = Tuned(steps=2, rate="1e-3", rates=[1, .5])
    assert part == Tuned(steps=2, rate=.001, rates=(1., .5)) and isinstance(part.rates, tuple)
    assert isinstance(Tuned(rate=1).rate, float)

@pytest.mark.parametrize("said, sentence", [
    (dict(steps=0), "Tuned: steps is at least 1; found 0"),
    (dict(rate=2.), r"rate lies in \(0, 1\]; found 2.0"),
    (dict(word="c"), "Unknown word of Tuned 'c'"),
    (dict(rates=[]), "a list of at least one; found an empty list"),
    (dict(steps=1.5), "Tuned: steps"), (dict(rate=True), "Tuned: rate")])
def test_settings_outside_their_limits(said, sentence):
    with pytest.raises(DiffDAError, match=sentence): Tuned(**said)

def test_who_decides_on_a_setting():
    "Its own < recipe < budget of a small generator < override < user; the generator fills what is left."
    nano, scans = get_backbone("nano"), get_task("nano-scans-5")
    assert settled(Tuned(), nano).steps == 2 and settled(Tuned(), nano, scans).steps == 3
    given = dict(recipe={"steps": 4, "rate": .2}, override={"rate": .3}, user={"word": "b"})
    part = settled(Tuned(), nano, **given)
    assert (part.steps, part.rate, part.word) == (2, .3, "b") and part.guidance_scale == nano.guidance_scale
    big = settled(Tuned(), get_backbone("sd15"), **given)
    assert (big.steps, big.rate) == (4, .3) and settled(Tuned(steps=9), nano).steps == 9
    assert settled(Tuned(), nano, override={"steps": 5}, user={"steps": 6}).steps == 6

def test_a_part_without_a_budget_is_one_sentence():
    "Neither a default, nor a recipe, nor a small generator: somebody has to say it."
    says = r"Tuned.steps has no value for generator 'sd15'.*Give one: Tuned\(steps=…\)"
    with pytest.raises(DiffDAError, match=says):
        settled(Tuned(), get_backbone("sd15"))
    assert settled(Tuned(), get_backbone("sd15"), user={"steps": 5}).steps == 5

def test_settling_twice_changes_nothing():
    nano, task = get_backbone("nano"), get_task("nano-digits-5")
    for part in (SDEdit(), TextualInversion(), DreamBoothLoRA(), Tuned()):
        once = settled(part, nano, task)
        assert settled(once, nano, task) == once

# keys of earlier work

# the last two stand on the weights of the nano generator: another build of the world has others
KEYS = ("6f5a1c431f37731b", "bfcbf055b677619f", "3b4b87c15e6d46ee")

def test_keys_of_earlier_work():
    "They must be found for ever."
    assert digest(NANO_TRAINING) == "2681a6d71198a61a" and digest(Training()) == "bdb805a1613617a0"
    baseline, guided = plan(["baseline", "real-guidance"], ["nano-fashion"], (0,))
    assert (baseline.train.key, guided.pool.key, guided.train.key) == KEYS
