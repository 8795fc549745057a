"""What a table will cost: counts and hours of the paper, without any data; and what doctor and the split
tools say of data on disk."""
import dataclasses, json, math

import pytest
from PIL import Image

import trees, trees_fine
from diffda import cli, costs, data
from diffda.core import DiffDAError, make_dir, write_json
from diffda.costs import images_of, job_graph, measured, plan_text, rate_key, room
from diffda.data import (Task, Training, get_split, get_task, list_tasks, read_split_file, split_file,
                         write_split_file)
from diffda.datasets import base
from diffda.doctor import (check_apart, check_data, checkpoints_of, doctor, find_checkpoint, lacking,
                           paper_jobs, rule_file, to_fetch, verify)
from diffda.jobs import plan
from diffda.method import list_methods
from diffda.pipeline import run_all
from diffda.places import paper_notebook
from diffda.report import paper_values
from diffda.store import Store
from test_datasets_natural import TREES

TABLE2 = ["caltech101", "cifar100", "imagenet100", "imagenet1k"]
GENERATING = {"Real Guidance", "GIF", "DiffuseMix", "DA-Fusion", "Diff-Aug", "Diff-Mix"}


def planned(item, **params): return cli.planned_runs(paper_notebook(item), params)


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    "No dataset and no checkpoint of the papers is on this machine."
    for name in ("data", "hub"): (tmp_path/name).mkdir()
    monkeypatch.setenv("DIFFDA_DATA", str(tmp_path/"data"))
    monkeypatch.delenv("DIFFDA_CHECKPOINTS", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path/"hub"))


@pytest.fixture
def few_birds(tmp_path, monkeypatch):
    "Two classes of six birds, on purpose."
    trees_fine.birds(tmp_path/"data", classes=2, per_class=6)
    monkeypatch.setenv("DIFFDA_PARTIAL", "1")
    return tmp_path/"data"


# the paper's numbers

@pytest.fixture
def table2(store):
    jobs = planned("unidiffda/table02", scale="paper", equal_steps=False)
    return job_graph(jobs, store).explode("methods")


def test_the_papers_images(table2):
    pools = table2[table2.kind == "pool"]
    assert set(pools.methods) == GENERATING
    for _, own in pools.groupby("methods"):
        assert dict(zip(own.task, own.images)) == dict(zip(TABLE2, (12_125, 50_000, 125_000, 125_000)))


def test_the_papers_hours(table2):
    "Table 17, every cell: fine-tuning, generation, training and total of each method on three datasets."
    t17 = paper_values("unidiffda/table17")

    def cell(method, dataset, what):
        rows = t17[(t17.title == method) & (t17.setting == what) & t17.dataset.isin((dataset, "all"))]
        return float(rows.value.iloc[0])

    by = dict(index=["methods", "task"], columns="kind")
    hours = table2.pivot_table(values="hours", aggfunc="sum", **by).fillna(0)
    for method in GENERATING | {"Baseline"}:
        for task, column in zip(TABLE2, ("Caltech-101", "CIFAR-100", "ImageNet-100")):
            ours = hours.loc[(method, task)]
            for kind, what in (("adaptation", "FT"), ("pool", "GEN"), ("train", "CLS")):
                theirs = pytest.approx(cell(method, column, what), abs=.005)
                assert ours.get(kind, 0) == theirs, (method, task, what)
            assert ours.sum() == pytest.approx(cell(method, column, "TOTAL"), abs=.011)
    # as many images as ImageNet-100
    assert hours.loc[("Real Guidance", "imagenet1k")].sum() == pytest.approx(25.18, abs=.01)


def test_the_papers_numbers_of_training_images():
    "Classes times shots, from the papers."
    want = {"caltech101": 2425, "cifar100": 10_000, "imagenet100": 25_000, "imagenet1k": 25_000,
            "birds-5": 1000, "aircraft-10": 1000, "blood-5": 40, "blood-25": 200, "skin-10": 70,
            "skin-50": 350, "domainnet": 6900, "semi-inat-species": 9721, "birds-full": 5994,
            "cifar10-reduced": 4000, "cifar100-reduced": 4000}
    assert {name: images_of(get_task(name)) for name in want} == want


# the graph of jobs

def test_jobs_are_shared(store):
    "One chain of fine-tuning for Diff-Aug and Diff-Mix, and its first link for DA-Fusion too."
    graph = job_graph(plan(["da-fusion", "diff-aug", "diff-mix"], ["birds-5"], (0, 1)), store)
    tuned = graph[graph.kind == "adaptation"]
    assert len(tuned) == 4 and sorted(map(len, tuned.methods)) == [2, 2, 3, 3]
    assert not graph.done.any()


def test_cheaper_settings_cost_less(store):
    def hours(**settings):
        jobs = plan(["real-guidance"], ["caltech101"], (0,), **settings)
        return job_graph(jobs, store).set_index("kind").hours

    whole, low, one = hours(), hours(strength=.1), hours(num_copies=1)
    assert low["pool"] == pytest.approx(whole["pool"]*2/22)
    assert one["pool"] == pytest.approx(whole["pool"]/5) and one["train"] == pytest.approx(whole["train"]/3)
    assert hours(epochs=50)["train"] == pytest.approx(whole["train"]/2)


def test_medical_data_is_tuned_for_500_steps(store):
    graph = job_graph(plan(["diff-aug"], ["blood-5"], (0,)), store)
    assert list(graph[graph.kind == "adaptation"].steps) == [500, 500]
    assert graph[graph.kind == "pool"].images.iloc[0] == 200


def test_fine_tuning_per_class_counts_every_class(store):
    graph = job_graph(plan(["da-fusion"], ["voc-4"], (0,), protocol="dafusion"), store)
    assert graph[graph.kind == "adaptation"].steps.iloc[0] == 20*1000
    assert graph[graph.kind == "pool"].images.iloc[0] == 20*4*10


def test_every_paper_task_and_method_has_a_plan(store):
    for task in list_tasks("paper"):
        graph = job_graph(plan(["baseline", "diff-mix", "gif"], [task], (0,)), store)
        assert (graph.hours >= 0).all() and graph.hours.sum() > 0, task
    assert len(job_graph(plan(list_methods(), ["birds-1"], (0,)), store)) >= 20


# what was measured

@pytest.fixture
def little_is_enough(monkeypatch): monkeypatch.setattr(costs, "ENOUGH", dict.fromkeys(costs.ENOUGH, 0))


def baseline(seed=0, epochs=2): return plan(["baseline"], ["nano-digits-1"], (seed,), epochs=epochs)


def test_ten_images_say_nothing(store):
    run_all(baseline(), store, progress=False)
    assert measured(store) == {}


def test_what_was_measured_here_counts_more(store, little_is_enough):
    assert measured(store) == {} and set(job_graph(baseline(), store).known) == {"assumed"}
    run_all(baseline(), store, progress=False)
    assert ("train", "nano", "small-resnet", "32") in measured(store)
    graph = job_graph(baseline() + baseline(seed=1, epochs=4), store)
    assert list(graph.done) == [True, False] and set(graph.known) == {"measured"} and graph.hours.iloc[1] > 0


def test_an_interrupted_stage_is_not_a_measurement(store, little_is_enough):
    run_all(baseline(), store, progress=False)
    done = next(store.root.glob("train/*/DONE"))
    write_json(done, {**json.loads(done.read_text()), "resumed": True})
    assert measured(store) == {}


def test_what_a_small_generator_took_says_nothing_about_a_large_one(store):
    "Rates are kept by generator and resolution."
    def one(backbone): return plan(["real-guidance"], ["caltech101"], (0,), backbone=backbone)

    def graph(backbone): return job_graph(one(backbone), store).set_index("kind")

    def finished(backbone):
        "As if an hour's work of this generator had taken a second."
        effort = dataclasses.replace(costs.outlined(one(backbone))[0].pool.about, work=1e6)
        done = {"seconds": 1., "effort": dataclasses.asdict(effort), "machine": costs.machine()}
        write_json(make_dir(store.root/"pool"/"x")/"DONE", done)
        return rate_key(effort)

    assert finished("nano") in measured(store)
    sd15, sd21, half = graph("sd15"), graph("sd21"), graph("sd15@256")
    assert set(sd15.known) == {"Table 17"} and sd21.known["train"] == "Table 17"
    assert sd21.known["pool"] == half.known["pool"] == "Table 17, by the number of pixels"
    assert math.isclose(sd21.hours["pool"], sd15.hours["pool"]*2.25)
    assert math.isclose(half.hours["pool"], sd15.hours["pool"]/4)
    assert sd21.hours["train"] == sd15.hours["train"]
    job = costs.outlined(one("sd15"))[0]
    # as doctor says
    assert math.isclose(sd15.gigabytes["pool"], room(job.task, job.backbone, 5*images_of(job.task)))
    assert finished("sd15") in measured(store) and graph("sd15").known["pool"] == "measured"


# the command

def test_plan_command(tmp_path, capsys):
    args = ["plan", "unidiffda/table02", "--store", str(tmp_path/"store")]
    assert cli.main([*args, "--scale", "paper", "-p", "equal_steps=false"]) == 0
    out = capsys.readouterr().out
    for said in ("36 classifiers", "12,125", "125,000", "28.60 h", "on one GPU", "Data to get first: ",
                 "Checkpoints to download: ", "stable-diffusion-v1-5 (about 5.5 GB)"):
        assert said in out, said
    assert cli.main([*args, "-p", "seed=[0]"]) == 2


@pytest.mark.parametrize("item", ["table03", "table04", "table05", "table08", "table09"])
@pytest.mark.parametrize("scale", ["nano", "paper"])
def test_every_table_can_be_planned(item, scale, tmp_path):
    text = cli.plan_of(f"unidiffda/{item}", scale, tmp_path/"store")
    assert "classifiers" in text and "generate" in text and "Total:" in text


def test_the_sweep_is_part_of_the_plan():
    jobs = planned("unidiffda/table03", scale="nano")
    swept = [job for job in jobs if job.method.name == "diff-aug" and job.task.name == "nano-digits-5"]
    assert {job.method.generate.strength for job in swept} == {.1, .9}
    assert len(plan_text(jobs, Store("nowhere")).splitlines()) > 30


def test_a_notebook_without_a_grid(toy, tmp_path, monkeypatch):
    make_dir(tmp_path/"results"/"toy"/"table01")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DiffDAError, match="no cell tagged `grid`"): cli.planned_runs(toy(), {})


def test_protocol_of_a_table():
    "The notebook leaves to the protocol what it sets by itself otherwise."
    jobs = planned("unidiffda/table02", scale="paper", protocol="dafusion", methods=["da-fusion"],
                   tasks=["voc-4"], equal_steps=False)
    assert [(job.method.generate.num_copies, job.method.utilize.name) for job in jobs] == [(10, "lrr")]


@pytest.mark.parametrize("params, says", [
    ("change={num_copies: 3}", "num_copies is a parameter of its own"),
    ("change={epochs: 3}", "write -p epochs="), ("change={1: 3}", "1 is none"),
    ("change={finetune: 3}", "'finetune' is none")])
def test_changes_that_are_none(params, says, capsys):
    assert cli.main(["plan", "unidiffda/table03", "-p", params]) == 2
    assert says in capsys.readouterr().err


def test_a_rate_in_the_form_of_yaml():
    jobs = planned("unidiffda/table02", methods=["da-fusion"], change={"TextualInversion.lr": "1e-3"})
    assert {job.method.finetune.parts[0].lr for job in jobs} == {.001}


def test_what_prompts_need_shows_before_any_work():
    task = Task("mine", "mine", "paper", "fine-grained", 2, Training(), "", "sd15", metaclass="dog")
    medical = dataclasses.replace(task, family="medical")
    for method, on, settings, says in (
            ("diff-ii", task, {}, "there are none for task 'mine'"),
            ("diff-aug", dataclasses.replace(task, metaclass=None), {}, "needs a metaclass"),
            ("gif", medical, {}, "needs a medium"),
            ("gif", "nano-digits-1", {"safety": 2}, "no safety checker"),
            ("gif", "birds-1", {"safety": -1}, "whole number from 0")):
        with pytest.raises(DiffDAError, match=says): plan([method], [on], (0,), **settings)


# what jobs need

def test_jobs_say_what_they_need():
    "The objects are asked, by no kind and no name: a part of a stranger's is looked for like any other."
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Scorer(type(plan(["real-guidance"], ["birds-1"], (0,))[0].method.generate)):
        def checkpoints(self, backbone): return ("someone/scorer",)

    job = plan(["real-guidance"], ["birds-1"], (0,), safety=1, backbone="sd21")[0]
    mine = dataclasses.replace(job, method=dataclasses.replace(job.method, generate=Scorer(), title="Mine"))
    needed = checkpoints_of([job, mine, mine])
    assert {source: who for source, (_, who) in needed.items()} == {
        "stabilityai/stable-diffusion-2-1": ["generator sd21"], "someone/scorer": ["Mine"],
        "CompVis/stable-diffusion-safety-checker": ["the safety checker"]}
    data, models = lacking([mine])
    assert [source.name for source in data] == ["birds"] and models == list(checkpoints_of([mine]))
    assert checkpoints_of(plan(["baseline"], ["birds-1"], (0,))) == {}
    assert to_fetch(plan(["gif"], ["nano-digits-1"], (0,))) == []


def test_captions_are_asked_for():
    job = plan(["mvc"], ["cifar10-reduced"], (0,), **{"MVCTuning.captions": "blip2"})[0]
    assert checkpoints_of([job])["Salesforce/blip2-opt-2.7b"][1] == [job.method.title]


def test_a_method_that_cannot_run_needs_nothing():
    "Stable Diffusion 2.1 has no editor, and 3.5 no U-Net."
    def found(backbone):
        tasks = [dataclasses.replace(get_task("birds-5"), backbone=backbone)]
        return {job.method.name for job in paper_jobs(tasks)}

    assert "diffusemix" in found("sd15") and "diffusemix" not in found("sd21") and "diff-mix" in found("sd21")
    assert "diff-ii" not in found("sd35")


def test_a_backbone_that_does_not_exist_is_no_method_that_cannot_run(monkeypatch):
    monkeypatch.setenv("DIFFDA_CHECKPOINTS", "/nosuch")
    with pytest.raises(DiffDAError, match="DIFFDA_CHECKPOINTS is /nosuch"): doctor(["birds-5"])


def test_checkpoints_of_other_generators_and_of_the_checker(capsys, tmp_path):
    assert cli.main(["doctor", "caltech101", "--backbone", "sd21"]) == 1
    said = capsys.readouterr().out
    assert "checkpoint stabilityai/stable-diffusion-2-1" in said and "stable-diffusion-v1-5" not in said
    assert cli.main(["doctor", "caltech101", "--backbone", "sd22"]) == 1
    assert "did you mean sd21" in capsys.readouterr().err
    args = ["plan", "unidiffda/table02", "--scale", "paper", "--store", str(tmp_path/"store")]
    for pair in ("methods=[real-guidance]", "backbone=sd21", "equal_steps=false"): args += ["-p", pair]
    assert cli.main(args) == 0 and "safety-checker" not in capsys.readouterr().out
    assert cli.main([*args, "-p", "safety_checker=2"]) == 0
    assert "CompVis/stable-diffusion-safety-checker" in capsys.readouterr().out
    # who only looks leaves nothing
    assert not (tmp_path/"store").exists()


def test_doctor_finds_checkpoints(tmp_path, monkeypatch):
    folder = make_dir(tmp_path/"models"/"openai"/"clip-vit-base-patch32")
    monkeypatch.setenv("DIFFDA_CHECKPOINTS", str(tmp_path/"models"))
    assert find_checkpoint("openai/clip-vit-base-patch32") == folder
    assert find_checkpoint("CompVis/stable-diffusion-v1-4") is None


# doctor

def test_doctor_of_the_embedded_world(capsys):
    assert cli.main(["doctor", "nano-digits-5", "nano-stains-10"]) == 0
    out = capsys.readouterr().out
    assert "data of nano-digits-5: 5 classes" in out and "PROBLEM" not in out and "in order." in out


def test_doctor_takes_tasks_of_ones_own():
    own = dataclasses.replace(get_task("nano-digits-5"), name="mine")
    assert [finding.what for finding in doctor([own])][:2] == ["data of mine", f"checkpoint {generator()}"]


def generator(): return checkpoints_of(plan(["real-guidance"], ["nano-digits-1"], (0,))).popitem()[0]


def test_doctor_says_what_is_missing_and_how_to_get_it(capsys):
    assert cli.main(["doctor", "birds-5"]) == 1
    out = capsys.readouterr().out
    assert "PROBLEM  data of birds-5: Dataset CUB-200-2011" in out
    assert "To get it: " in out and "DIFFDA_DATA" in out
    source = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert f"PROBLEM  checkpoint {source}: not on this machine" in out and "about 5.5 GB" in out
    assert "$DIFFDA_CHECKPOINTS" in out and "disk of" in out


def test_a_small_generator_needs_no_gpu(monkeypatch):
    "Whatever the data."
    monkeypatch.setattr("diffda.models.default_device", lambda: "cpu")
    def device(**settings): return {f.what: f.ok for f in doctor(["birds-5"], **settings)}["device"]
    assert device(backbone="nano") and not device()


def test_unknown_task(capsys):
    assert cli.main(["doctor", "bird-5"]) == 2
    assert "did you mean birds-5" in capsys.readouterr().err


def test_a_damaged_image_shows_in_the_deep_look(few_birds):
    task = get_task("birds-1")
    assert check_data(task).ok and check_data(task, deep=True).ok
    victim = sorted(path for path in few_birds.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))[3]
    victim.write_bytes(victim.read_bytes()[:60])
    found = check_data(task, deep=True)
    assert not found.ok and "1 of its images cannot be read" in found.says and victim.name in found.says


def replaced_source(monkeypatch, name, **changes):
    "Let the dataset called `name` have other fields."
    own = base.get_source(name)
    monkeypatch.setitem(base.SOURCES.known, name, dataclasses.replace(own, **changes))
    return own


def known(monkeypatch, task):
    "Let `task` be a known one."
    list_tasks()
    monkeypatch.setitem(data.TASKS.known, task.name, task)
    return task


def test_doctor_downloads_what_it_can(tmp_path, monkeypatch, capsys):
    asked = []

    def download(root):
        asked.append(root)
        trees.cifar10(tmp_path/"data")

    monkeypatch.setenv("DIFFDA_PARTIAL", "1")
    own = replaced_source(monkeypatch, "cifar10", download=download)
    few = dataclasses.replace(get_task("cifar10-reduced"), name="cifar10-few", shots=2, backbone="nano")
    known(monkeypatch, few)
    cli.main(["doctor", "cifar10-few", "--download"])
    assert "ok       data of cifar10-few" in capsys.readouterr().out
    assert asked == [tmp_path/"data"/own.folders[0]]


def test_a_download_that_fails(tmp_path, monkeypatch, capsys):
    def refused(root): raise OSError("no route to host")

    replaced_source(monkeypatch, "caltech101", download=refused)
    assert cli.main(["doctor", "caltech101", "--download"]) == 1
    said = capsys.readouterr().err
    assert "could not be downloaded" in said and "no route to host" in said
    assert not (tmp_path/"data"/"caltech101").exists()


def test_nothing_is_written_into_data(tmp_path, monkeypatch, few_birds):
    own = dataclasses.replace(get_task("nano-digits-1"), name="own", dataset=str(tmp_path/"pets"))
    check_apart(own, tmp_path/"pets-results", tmp_path)
    (tmp_path/"link").symlink_to(tmp_path/"pets")
    for inside in (tmp_path/"pets", tmp_path/"pets"/"results", tmp_path/"link"/"store"):
        with pytest.raises(DiffDAError, match="inside the data of own"):
            check_apart(own, tmp_path/"out", inside)
    check_apart(get_task("birds-1"), few_birds/"results")
    with pytest.raises(DiffDAError, match="inside the data of birds-1"):
        check_apart(get_task("birds-1"), base.source_folder(base.get_source("birds"))/"images")
    # a dataset that is not here has no folder to be in
    check_apart(get_task("caltech101"), tmp_path/"data"/"caltech101")


# splits

def test_names_after_options_and_lists_of_ones_own(tmp_path, few_birds, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = tmp_path/"splits"/"birds"/"birds-1.json"
    assert cli.main(["splits", "export", "--dir", "splits", "birds-1"]) == 0 and path.exists()
    capsys.readouterr()
    assert cli.main(["splits", "verify"]) == 0
    said = capsys.readouterr().out
    assert said.count("ok ") == len(list_tasks("nano")) + 1 and "split of birds-1: 3 seeds" in said
    assert cli.main(["splits", "verify", "--dir", "nosuch"]) == 2
    assert "There is no folder nosuch" in capsys.readouterr().err
    with pytest.raises(SystemExit): cli.main(["splits", "verify", "birds-1", "--nosuch"])


@pytest.mark.parametrize("text, says", [("[1]", "is damaged"), ("{}", "no split file")])
def test_lists_that_say_nothing(text, says, tmp_path, few_birds, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cli.main(["splits", "export", "birds-1"])
    (tmp_path/"splits"/"birds"/"birds-1.json").write_text(text)
    capsys.readouterr()
    assert cli.main(["splits", "verify", "birds-1"]) == 1
    said = capsys.readouterr()
    assert says in said.out + said.err


def test_export_and_verify(tmp_path, few_birds, capsys):
    out = tmp_path/"lists"
    args = ["birds-1", "--dir", str(out)]
    assert cli.main(["splits", "export", *args, "--seeds", "0", "5"]) == 0
    listed = json.loads(split_file(get_task("birds-1"), out).read_text())
    assert set(listed["digests"]) == {"0", "5"} and listed["counts"]["train"] == 2
    assert listed["train_ids"]["5"] == get_split("birds-1", 5).train.ids
    assert cli.main(["splits", "verify", *args]) == 0
    assert "2 seeds, 2 training images" in capsys.readouterr().out
    chosen = listed["train_ids"]["0"][0].split("/")[-1]
    victim = next(path for path in few_birds.rglob("*") if path.stem == chosen)
    Image.new("RGB", (9, 9)).save(victim)
    assert cli.main(["splits", "verify", *args]) == 1
    assert "other ones than those listed, for seed 0" in capsys.readouterr().out


def test_export_and_verify_meet(tmp_path, few_birds, monkeypatch, capsys):
    "Without --dir, verify looks at what export has written in the current folder."
    monkeypatch.chdir(tmp_path)
    assert cli.main(["splits", "verify", "birds-1"]) == 1
    assert "splits export birds-1" in capsys.readouterr().out
    assert cli.main(["splits", "export", "birds-1"]) == 0 and cli.main(["splits", "verify", "birds-1"]) == 0


_FINE = ("birds", "aircraft", "aircraft_cropped", "flowers102", "cars", "blood", "skin", "brain_tumor",
         "coco", "voc", "spurge")
FORMS = {**{name: (name, build) for name, build in TREES.items()},
         **{name: (name.replace("_", "-"), trees_fine.TREES[name]) for name in _FINE}}


@pytest.mark.parametrize("name", FORMS)
def test_every_dataset_is_exported_and_verified(name, tmp_path, monkeypatch):
    """A list written from one copy of a dataset holds for another copy, whose files were made in another
    order, and for nothing else."""
    dataset, build = FORMS[name]
    if dataset == "brain-tumor": pytest.importorskip("h5py")
    tasks = [get_task(name) for name in list_tasks("paper")]
    like = next((task for task in tasks if task.dataset == dataset), get_task("aircraft-1"))
    task = known(monkeypatch, dataclasses.replace(like, name=f"{dataset}-2", dataset=dataset, shots=2))
    monkeypatch.setenv("DIFFDA_PARTIAL", "1")
    more = {"brain-tumor": {"patients": 12}, "flowers102": {"per_part": 2}}.get(dataset, {})
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
    assert "states the rule and no digest" in verify(task).says


def test_faults_of_split_files(tmp_path, capsys):
    assert cli.main(["splits", "export"]) == 2 and "Name the tasks" in capsys.readouterr().err
    assert cli.main(["splits", "export", "birds-1", "--dir", str(tmp_path)]) == 1
    assert "CUB-200-2011" in capsys.readouterr().err
    path = split_file(get_task("nano-digits-1"), tmp_path)
    make_dir(path.parent)
    path.write_text("{not json")
    assert cli.main(["splits", "verify", "nano-digits-1", "--dir", str(tmp_path)]) == 1
    assert "is damaged" in capsys.readouterr().err
