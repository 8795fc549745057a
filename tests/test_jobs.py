"What a table will cost: counts and hours of the paper, without any data; and what doctor and the split tools say of data on disk."
import dataclasses, json, math

import pytest

import trees_fine
from diffda import cli, data
from diffda.core import DiffDAError, Store, make_dir, write_json
from diffda.data import get_split, get_task, list_tasks, read_split_file, split_file, write_split_file
from diffda.doctor import check_data, doctor, find_checkpoint, images_of, room, rule_file, verify
from diffda.jobs import job_graph, plan_text
from diffda.pipeline import effort, measured, plan, rate_key
from diffda.report import paper_notebook, paper_values
from test_datasets_natural import TREES

TABLE2 = ["caltech101", "cifar100", "imagenet100", "imagenet1k"]
GENERATING = {"Real Guidance", "GIF", "DiffuseMix", "DA-Fusion", "Diff-Aug", "Diff-Mix"}

@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    "No dataset and no checkpoint of the papers is on this machine."
    (tmp_path/"data").mkdir(); (tmp_path/"hub").mkdir()
    monkeypatch.setenv("DIFFDA_DATA", str(tmp_path/"data")); monkeypatch.delenv("DIFFDA_CHECKPOINTS", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path/"hub"))

@pytest.fixture
def table2(store):
    runs = cli.planned_runs(paper_notebook("unidiffda/table02"), {"scale": "paper", "equal_steps": False})
    return job_graph(runs, store).explode("methods")

def test_the_papers_images(table2):
    pools = table2[table2.kind == "pool"]
    assert set(pools.methods) == GENERATING
    for _, own in pools.groupby("methods"): assert dict(zip(own.task, own.images)) == dict(zip(TABLE2, (12_125, 50_000, 125_000, 125_000)))

def test_the_papers_hours(table2):
    "Table 17, every cell: fine-tuning, generation, training and total of each method on three datasets."
    t17 = paper_values("unidiffda/table17")
    cell = lambda m, d, what: float(t17[(t17.title == m) & (t17.setting == what) & t17.dataset.isin((d, "all"))].value.iloc[0])
    hours = table2.pivot_table(index=["methods", "task"], columns="kind", values="hours", aggfunc="sum").fillna(0)
    for m in GENERATING | {"Baseline"}:
        for task, column in zip(TABLE2[:3], ("Caltech-101", "CIFAR-100", "ImageNet-100")):
            h = hours.loc[(m, task)]
            for kind, what in (("adaptation", "FT"), ("pool", "GEN"), ("train", "CLS")): assert h.get(kind, 0) == pytest.approx(cell(m, column, what), abs=.005), (m, task, what)
            assert h.sum() == pytest.approx(cell(m, column, "TOTAL"), abs=.011)
    assert hours.loc[("Real Guidance", "imagenet1k")].sum() == pytest.approx(25.18, abs=.01)          # as many images as ImageNet-100

def test_jobs_are_shared(store):
    "One chain of fine-tuning for Diff-Aug and Diff-Mix, and its first link for DA-Fusion too."
    runs = plan(["da-fusion", "diff-aug", "diff-mix"], ["birds-5"], (0, 1))
    jobs = job_graph(runs, store)
    tuned = jobs[jobs.kind == "adaptation"]
    assert len(tuned) == 4 and sorted(map(len, tuned.methods)) == [2, 2, 3, 3] and not jobs.done.any()

def test_cheaper_settings_cost_less(store):
    hours = lambda **c: job_graph(plan(["real-guidance"], ["caltech101"], (0,), **c), store).set_index("kind").hours
    whole, low, one = hours(), hours(strength=.1), hours(num_copies=1)
    assert low["pool"] == pytest.approx(whole["pool"]*2/22) and one["pool"] == pytest.approx(whole["pool"]/5) and one["train"] == pytest.approx(whole["train"]/3)
    assert hours(epochs=50)["train"] == pytest.approx(whole["train"]/2)

def test_medical_data_is_tuned_for_500_steps(store):
    jobs = job_graph(plan(["diff-aug"], ["blood-5"], (0,)), store)
    assert list(jobs[jobs.kind == "adaptation"].steps) == [500, 500] and jobs[jobs.kind == "pool"].images.iloc[0] == 200

def test_every_paper_task_and_method_has_a_plan(store):
    from diffda.method import list_methods
    for t in list_tasks("paper"):
        jobs = job_graph(plan(["baseline", "diff-mix", "gif"], [t], (0,)), store)
        assert (jobs.hours >= 0).all() and jobs.hours.sum() > 0, t
    assert len(job_graph(plan(list_methods(), ["birds-1"], (0,)), store)) >= 20

def test_what_was_measured_here_counts_more(store, monkeypatch):
    from diffda.pipeline import run_all
    runs = plan(["baseline"], ["nano-digits-1"], (0,), epochs=2)
    run_all(runs, store, progress=False)
    assert measured(store) == {}                                             # ten images say nothing
    monkeypatch.setattr("diffda.pipeline.ENOUGH", dict.fromkeys(("adaptation", "pool", "train"), 0))
    store = Store(store.root/"another")
    assert measured(store) == {} and set(job_graph(runs, store).known) == {"assumed"}
    run_all(runs, store, progress=False)
    assert ("train", "nano", "small-resnet", "32") in measured(store)
    later = plan(["baseline"], ["nano-digits-1"], (1,), epochs=4)
    jobs = job_graph(runs + later, store)
    assert list(jobs.done) == [True, False] and set(jobs.known) == {"measured"} and jobs.hours.iloc[1] > 0

def test_an_interrupted_stage_is_not_a_measurement(store, monkeypatch):
    monkeypatch.setattr("diffda.pipeline.ENOUGH", dict.fromkeys(("adaptation", "pool", "train"), 0))
    from diffda.pipeline import run_all
    run_all(plan(["baseline"], ["nano-digits-1"], (0,), epochs=2), store, progress=False)
    done = next(store.root.glob("train/*/DONE"))
    done.write_text(json.dumps({**json.loads(done.read_text()), "resumed": True}))
    assert measured(store) == {}

# the command

def test_plan_command(tmp_path, capsys):
    assert cli.main(["plan", "unidiffda/table02", "--scale", "paper", "-p", "equal_steps=false", "--store", str(tmp_path/"store")]) == 0
    out = capsys.readouterr().out
    assert "36 classifiers" in out and "12,125" in out and "125,000" in out and "28.60 h" in out and "on one GPU" in out
    assert "Data to get first: " in out and "stable-diffusion-v1-5" in out and not (tmp_path/"data").stat().st_size > 10**6
    assert cli.main(["plan", "unidiffda/table02", "-p", "seed=[0]", "--store", str(tmp_path/"store")]) == 2

@pytest.mark.parametrize("item", ["unidiffda/table03", "unidiffda/table04", "unidiffda/table05", "unidiffda/table08", "unidiffda/table09"])
@pytest.mark.parametrize("scale", ["nano", "paper"])
def test_every_table_can_be_planned(item, scale, tmp_path):
    text = cli.plan_of(item, scale, tmp_path/"store")
    assert "classifiers" in text and "generate" in text and "Total:" in text

def test_what_a_small_generator_took_says_nothing_about_a_large_one(store):
    "Rates are kept by generator and resolution."
    runs = plan(["real-guidance"], ["caltech101"], (0,))
    tiny = dataclasses.replace(runs[0], task=dataclasses.replace(runs[0].task, backbone="nano"))
    done = make_dir(store.root/"pool"/"x")/"DONE"
    write_json(done, {"seconds": 1., **effort(tiny, tiny.method.generate, 1e6)})
    assert rate_key(tiny, "pool", tiny.method.generate) in measured(store) and rate_key(runs[0], "pool", runs[0].method.generate) not in measured(store)
    by = lambda backbone: job_graph(plan(["real-guidance"], ["caltech101"], (0,), backbone=backbone), store).set_index("kind")
    sd15, sd21, half = by("sd15"), by("sd21"), by("sd15@256")
    assert set(sd15.known) == {"Table 17"} and sd21.known["pool"] == half.known["pool"] == "Table 17, by the number of pixels" and sd21.known["train"] == "Table 17"
    assert math.isclose(sd21.hours["pool"], sd15.hours["pool"]*2.25) and math.isclose(half.hours["pool"], sd15.hours["pool"]/4) and sd21.hours["train"] == sd15.hours["train"]
    assert math.isclose(sd15.gigabytes["pool"], room(get_task("caltech101")))                     # as doctor says
    write_json(done, {"seconds": 1., **effort(runs[0], runs[0].method.generate, 1e6)})
    assert by("sd15").known["pool"] == "measured"

def test_checkpoints_of_other_generators_and_of_the_checker(capsys, tmp_path):
    assert cli.main(["doctor", "caltech101", "--backbone", "sd21"]) == 1
    assert "checkpoint stabilityai/stable-diffusion-2-1" in (said := capsys.readouterr().out) and "stable-diffusion-v1-5" not in said
    assert cli.main(["doctor", "caltech101", "--backbone", "sd22"]) == 1 and "did you mean sd21" in capsys.readouterr().err
    args = ["plan", "unidiffda/table02", "--scale", "paper", "-p", "methods=[real-guidance]", "-p", "backbone=sd21", "-p", "equal_steps=false", "--store", str(tmp_path/"store")]
    assert cli.main(args) == 0 and "safety-checker" not in capsys.readouterr().out
    assert cli.main([*args, "-p", "safety_checker=2"]) == 0 and "CompVis/stable-diffusion-safety-checker" in capsys.readouterr().out
    assert not (tmp_path/"store").exists()                               # who only looks leaves nothing
    assert cli.main(["list", "backbones"]) == 0 and "sd35" in capsys.readouterr().out

def test_the_sweep_is_part_of_the_plan():
    runs = cli.planned_runs(paper_notebook("unidiffda/table03"), {"scale": "nano"})
    assert {r.method.generate.strength for r in runs if r.method.name == "diff-aug" and r.task.name == "nano-digits-5"} == {.1, .9}

def test_a_notebook_without_a_grid(toy, tmp_path, monkeypatch):
    (tmp_path/"results"/"toy"/"table01").mkdir(parents=True); monkeypatch.chdir(tmp_path)
    with pytest.raises(DiffDAError, match="no cell tagged `grid`"): cli.planned_runs(toy(), {})

# doctor

def test_doctor_of_the_embedded_world(capsys):
    assert cli.main(["doctor", "nano-digits-5", "nano-stains-10"]) == 0
    out = capsys.readouterr().out
    assert "data of nano-digits-5: 5 classes" in out and "PROBLEM" not in out and "in order." in out

def test_doctor_says_what_is_missing_and_how_to_get_it(capsys):
    assert cli.main(["doctor", "birds-5"]) == 1
    out = capsys.readouterr().out
    assert "PROBLEM  data of birds-5: Dataset CUB-200-2011" in out and "To get it: " in out and "DIFFDA_DATA" in out
    assert "PROBLEM  checkpoint stable-diffusion-v1-5/stable-diffusion-v1-5: not on this machine" in out and "$DIFFDA_CHECKPOINTS" in out and "disk of" in out

def test_doctor_finds_checkpoints(tmp_path, monkeypatch):
    (tmp_path/"models"/"openai"/"clip-vit-base-patch32").mkdir(parents=True)
    monkeypatch.setenv("DIFFDA_CHECKPOINTS", str(tmp_path/"models"))
    assert find_checkpoint("openai/clip-vit-base-patch32") == tmp_path/"models"/"openai"/"clip-vit-base-patch32" and find_checkpoint("CompVis/stable-diffusion-v1-4") is None

def test_unknown_task(capsys):
    assert cli.main(["doctor", "bird-5"]) == 2 and "did you mean birds-5" in capsys.readouterr().err

def test_a_damaged_image_shows_in_the_deep_look(tmp_path, monkeypatch):
    trees_fine.birds(tmp_path/"data", classes=2, per_class=6)
    monkeypatch.setenv("DIFFDA_PARTIAL", "1")
    task = get_task("birds-1")
    assert check_data(task).ok and check_data(task, deep=True).ok
    victim = sorted(p for p in (tmp_path/"data").rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))[3]
    victim.write_bytes(victim.read_bytes()[:60])
    found = check_data(task, deep=True)
    assert not found.ok and "1 of its images cannot be read" in found.says and victim.name in found.says

def test_doctor_downloads_what_it_can(tmp_path, monkeypatch, capsys):
    import trees
    from diffda.datasets import base
    own = base.get_source("cifar10")
    monkeypatch.setenv("DIFFDA_PARTIAL", "1")
    asked = []
    def download(root): asked.append(root); trees.cifar10(tmp_path/"data")
    monkeypatch.setitem(base._SOURCES, "cifar10", dataclasses.replace(own, download=download))
    monkeypatch.setitem(data.TASKS, "cifar10-few", dataclasses.replace(get_task("cifar10-reduced"), name="cifar10-few", shots=2, backbone="nano"))
    cli.main(["doctor", "cifar10-few", "--download"])
    assert "ok       data of cifar10-few" in capsys.readouterr().out and asked == [tmp_path/"data"/own.folders[0]]
    def refused(root): raise OSError("no route to host")
    monkeypatch.setitem(base._SOURCES, "caltech101", dataclasses.replace(base.get_source("caltech101"), download=refused))
    assert cli.main(["doctor", "caltech101", "--download"]) == 1
    assert "could not be downloaded" in (said := capsys.readouterr().err) and "no route to host" in said and not (tmp_path/"data"/"caltech101").exists()

# splits

def test_names_after_options_and_lists_of_ones_own(tmp_path, monkeypatch, capsys):
    trees_fine.birds(tmp_path/"data", classes=2, per_class=6)
    monkeypatch.setenv("DIFFDA_PARTIAL", "1"); monkeypatch.chdir(tmp_path)
    assert cli.main(["splits", "export", "--dir", "splits", "birds-1"]) == 0 and (tmp_path/"splits"/"birds"/"birds-1.json").exists()
    capsys.readouterr()
    assert cli.main(["splits", "verify"]) == 0
    assert (said := capsys.readouterr().out).count("ok ") == len(list_tasks("nano")) + 1 and "split of birds-1: 3 seeds" in said
    assert cli.main(["splits", "verify", "--dir", "nosuch"]) == 2 and "There is no folder nosuch" in capsys.readouterr().err
    with pytest.raises(SystemExit): cli.main(["splits", "verify", "birds-1", "--nosuch"])
    for text, says in (("[1]", "is damaged"), ("{}", "states the rule and no digest")):
        (tmp_path/"splits"/"birds"/"birds-1.json").write_text(text)
        assert cli.main(["splits", "verify", "birds-1"]) == 1
        said = capsys.readouterr()
        assert says in said.out + said.err or text == "{}" and "no split file" in said.out, text

def test_export_and_verify(tmp_path, monkeypatch, capsys):
    trees_fine.birds(tmp_path/"data", classes=2, per_class=6)
    monkeypatch.setenv("DIFFDA_PARTIAL", "1")
    out = tmp_path/"lists"
    assert cli.main(["splits", "export", "birds-1", "--dir", str(out), "--seeds", "0", "5"]) == 0
    listed = json.loads(split_file(get_task("birds-1"), out).read_text())
    assert set(listed["digests"]) == {"0", "5"} and listed["train_ids"]["5"] == get_split("birds-1", 5).train.ids and listed["counts"]["train"] == 2
    assert cli.main(["splits", "verify", "birds-1", "--dir", str(out)]) == 0 and "2 seeds, 2 training images" in capsys.readouterr().out
    chosen = listed["train_ids"]["0"][0].split("/")[-1]
    victim = next(p for p in (tmp_path/"data").rglob("*") if p.stem == chosen)
    from PIL import Image
    Image.new("RGB", (9, 9)).save(victim)
    assert cli.main(["splits", "verify", "birds-1", "--dir", str(out)]) == 1 and "other ones than those listed, for seed 0" in capsys.readouterr().out

FORMS = {**{n: (n, build) for n, build in TREES.items()}, **{n: (n.replace("_", "-"), trees_fine.TREES[n]) for n in ("birds", "aircraft", "aircraft_cropped", "flowers102", "cars", "blood", "skin", "brain_tumor", "coco", "voc", "spurge")}}

@pytest.mark.parametrize("name", FORMS)
def test_every_dataset_is_exported_and_verified(name, tmp_path, monkeypatch):
    "A list written from one copy of a dataset holds for another copy, whose files were made in another order, and for nothing else."
    dataset, build = FORMS[name]
    if dataset == "brain-tumor": pytest.importorskip("h5py")
    known = next((get_task(t) for t in list_tasks("paper") if get_task(t).dataset == dataset), get_task("aircraft-1"))
    task = dataclasses.replace(known, name=f"{dataset}-2", dataset=dataset, shots=2)
    monkeypatch.setitem(data.TASKS, task.name, task)
    monkeypatch.setenv("DIFFDA_PARTIAL", "1")
    more = {"brain-tumor": {"patients": 12}, "aircraft": {}, "flowers102": {"per_part": 2}}.get(dataset, {})
    build(tmp_path/"data", **more)
    write_split_file(task, tmp_path/"lists", (0, 1))
    assert verify(task, tmp_path/"lists").ok
    build(tmp_path/"other", reverse=True, **more)
    monkeypatch.setenv("DIFFDA_DATA", str(tmp_path/"other"))
    assert verify(task, tmp_path/"lists").ok
    path = split_file(task, tmp_path/"lists")
    path.write_text(path.read_text().replace(get_split(task, 1).digest, "0"*16))
    assert "for seed 1:" in verify(task, tmp_path/"lists").says

def test_the_published_splits_of_the_embedded_data(capsys):
    assert cli.main(["splits", "verify"]) == 0
    assert capsys.readouterr().out.count("ok") == len(list_tasks("nano"))

@pytest.mark.parametrize("name", list_tasks("paper"))
def test_every_paper_task_has_a_rule_file(name):
    "What is published for data that only its owners hand out: the rule and the numbers, without a list."
    task = get_task(name)
    assert read_split_file(task) == rule_file(task) and not verify(task).ok

def test_the_papers_numbers_of_training_images():
    "Classes times shots, from the papers."
    want = dict(caltech101=2425, cifar100=10_000, imagenet100=25_000, imagenet1k=25_000) | {"birds-5": 1000, "aircraft-10": 1000, "blood-5": 40, "blood-25": 200, "skin-10": 70, "skin-50": 350, "domainnet": 6900,
            "semi-inat-species": 9721, "birds-full": 5994, "cifar10-reduced": 4000, "cifar100-reduced": 4000}
    assert {t: images_of(get_task(t)) for t in want} == want

def test_export_and_verify_meet(tmp_path, monkeypatch, capsys):
    "Without --dir, verify looks at what export has written in the current folder."
    trees_fine.birds(tmp_path/"data", classes=2, per_class=6)
    monkeypatch.setenv("DIFFDA_PARTIAL", "1"); monkeypatch.chdir(tmp_path)
    assert cli.main(["splits", "verify", "birds-1"]) == 1 and "splits export birds-1" in capsys.readouterr().out
    assert cli.main(["splits", "export", "birds-1"]) == 0 and cli.main(["splits", "verify", "birds-1"]) == 0

def test_fine_tuning_per_class_counts_every_class(store):
    jobs = job_graph(plan(["da-fusion"], ["voc-4"], (0,), protocol="dafusion"), store)
    assert jobs[jobs.kind == "adaptation"].steps.iloc[0] == 20*1000 and jobs[jobs.kind == "pool"].images.iloc[0] == 20*4*10

def test_protocol_of_a_table():
    "The notebook leaves to the protocol what it sets by itself otherwise."
    runs = cli.planned_runs(paper_notebook("unidiffda/table02"), {"scale": "paper", "protocol": "dafusion", "methods": ["da-fusion"], "tasks": ["voc-4"], "equal_steps": False})
    assert [(r.method.generate.num_copies, r.method.utilize) for r in runs] == [(10, "lrr")]

@pytest.mark.parametrize("params, says", [("change={num_copies: 3}", "num_copies is a parameter of its own"), ("change={epochs: 3}", "write -p epochs="), ("change={1: 3}", "1 is none"), ("change={finetune: 3}", "'finetune' is none")])
def test_changes_that_are_none(params, says, capsys):
    assert cli.main(["plan", "unidiffda/table03", "-p", params]) == 2 and says in capsys.readouterr().err

def test_a_rate_in_the_form_of_yaml(store):
    runs = cli.planned_runs(paper_notebook("unidiffda/table03"), {"methods": ["da-fusion"], "change": {"TextualInversion.lr": "1e-3"}, "sweep": []})
    assert {r.method.finetune.parts[0].lr for r in runs} == {.001}

def test_what_prompts_need_shows_before_any_work(tmp_path):
    from diffda.data import Recipe, Task
    task = Task("mine", "mine", "paper", "fine-grained", 2, Recipe(), "", "sd15", metaclass="dog")
    with pytest.raises(DiffDAError, match="there are none for task 'mine'"): plan(["diff-ii"], [task], (0,))
    with pytest.raises(DiffDAError, match="needs a metaclass"): plan(["diff-aug"], [dataclasses.replace(task, metaclass=None)], (0,))
    with pytest.raises(DiffDAError, match="needs a medium"): plan(["gif"], [dataclasses.replace(task, family="medical")], (0,))
    with pytest.raises(DiffDAError, match="no safety checker"): plan(["gif"], ["nano-digits-1"], (0,), safety=2)
    with pytest.raises(DiffDAError, match="whole number from 0"): plan(["gif"], ["birds-1"], (0,), safety=-1)

def test_faults_of_split_files(tmp_path, capsys):
    assert cli.main(["splits", "export"]) == 2 and "Name the tasks" in capsys.readouterr().err
    assert cli.main(["splits", "export", "birds-1", "--dir", str(tmp_path)]) == 1 and "CUB-200-2011" in capsys.readouterr().err
    path = split_file(get_task("nano-digits-1"), tmp_path); path.parent.mkdir(parents=True); path.write_text("{not json")
    assert cli.main(["splits", "verify", "nano-digits-1", "--dir", str(tmp_path)]) == 1 and "is damaged" in capsys.readouterr().err
