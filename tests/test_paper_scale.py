"""The papers' tables as `--scale paper` runs them: real notebooks, real loading code, real recipes; only the
data and the checkpoints are tiny ones of the same formats, and the counts are cut down."""
import json
from pathlib import Path

import pandas as pd, pytest, torch, torchvision

import tiny, trees, trees_fine
from diffda import cli
from diffda.method import get_method
from diffda.places import paper_notebook
from diffda.prompts import SUFFIXES

SHORT = ("{num_inference_steps: 10, TextualInversion.steps: 2, TextualInversion.batch_size: 2, "
         "TextualInversion.initializer: the, DreamBoothLoRA.steps: 2, DreamBoothLoRA.batch_size: 2}")
CUT = ["num_copies=1", "epochs=1", "backbone=sd15@64", f"change={SHORT}"]
IDS = {"sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
       "instruct-pix2pix": "timbrooks/instruct-pix2pix",
       "clip": "openai/clip-vit-base-patch32"}

@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "A folder of tiny checkpoints under the ids of the real ones, random ImageNet weights for torchvision."
    root = tmp_path_factory.mktemp("models")
    for kind, name in IDS.items(): tiny.checkpoint(kind, root/name)
    weights = root/"torch"/"hub"/"checkpoints"/"resnet50-0676ba61.pth"
    weights.parent.mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet50().state_dict(), weights)
    return root

def reproduce(item, tasks, models, tmp_path, monkeypatch, *more):
    "The folder of the results of `item`, its table and its records."
    places = dict(DIFFDA_DATA=tmp_path/"data", DIFFDA_CHECKPOINTS=models, DIFFDA_PARTIAL="1",
                  TORCH_HOME=models/"torch", HF_HUB_OFFLINE="1")
    for name, value in places.items(): monkeypatch.setenv(name, str(value))
    command = ["reproduce", f"unidiffda/{item}", "--scale", "paper", "--out", str(tmp_path/"out"),
               "--store", str(tmp_path/"store")]
    for param in (f"tasks={tasks}", *CUT, *more): command += ["-p", param]
    assert cli.main(command) == 0
    folder = tmp_path/"out"/"unidiffda"/item
    records = [json.loads(line) for line in (folder/"records.jsonl").read_text().splitlines()]
    return folder, pd.read_csv(folder/"table.csv"), records

def complete(folder, table, records, methods):
    "All rows are there, from the papers' recipes, beside the paper's numbers."
    assert {r["method"] for r in records} == set(methods) and {r["scale"] for r in records} == {"paper"}
    drawing = [r for r in records if get_method(r["method"]).generate]
    assert all(r["n_synthetic"] == r["n_real"] for r in drawing)
    assert table.paper_mean.notna().sum() >= len(methods)
    assert (folder/"figure.png").exists() and (folder/"claims.json").exists()

FEW = ["baseline", "mixup", "cutmix", "real-guidance", "gif", "diffusemix", "da-fusion", "diff-aug",
       "diff-mix",
       "diff-ii"]

def test_table_3_on_birds(models, tmp_path, monkeypatch, capsys):
    trees_fine.birds(tmp_path/"data", classes=3, per_class=4)
    folder, table, records = reproduce("table03", "[birds-1]", models, tmp_path, monkeypatch, "sweep=[]")
    complete(folder, table, records, FEW)
    pools = {r["method"]: Path(r["pool"]) for r in records if r["pool"]}
    first = {method: (p/"metadata.jsonl").read_text().splitlines()[0] for method, p in pools.items()}
    prompts = {method: json.loads(row)["prompt"] for method, row in first.items()}
    assert prompts["real-guidance"] == "a photo of Black_footed_Albatross"
    assert prompts["diff-aug"] == "a photo of a <black_footed_albatross> bird"
    assert any(prompts["diff-ii"].endswith(f"{suffix}.") for suffix in SUFFIXES["bird"])
    assert all(r["strength"] == .9 for r in records if r["method"] in ("diff-aug", "diff-mix"))
    assert "paper: Birds 1-shot" in capsys.readouterr().out

def few_of_caltech101(folder): trees.caltech101(folder, classes=("accordion", "ant"), per_class=33)
def few_of_blood(folder): trees_fine.blood(folder, per_class=8)

@pytest.mark.slow
@pytest.mark.parametrize("item, tree, task, left_out", [
    ("table02", few_of_caltech101, "caltech101", {"diff-ii"}),
    ("table04", trees_fine.aircraft, "aircraft-1", set()),
    ("table05", few_of_blood, "blood-5", {"diff-ii", "diffusemix"})])
def test_the_other_tables(item, tree, task, left_out, models, tmp_path, monkeypatch):
    tree(tmp_path/"data")
    more = ["sweep=[]"] if item == "table04" else []
    methods = [m for m in FEW if m not in left_out]
    complete(*reproduce(item, f"[{task}]", models, tmp_path, monkeypatch, *more), methods)

def test_a_missing_checkpoint_is_one_sentence(models, tmp_path, monkeypatch, capsys):
    trees_fine.birds(tmp_path/"data", classes=2, per_class=4)
    places = dict(DIFFDA_DATA=tmp_path/"data", DIFFDA_CHECKPOINTS=models/"torch", DIFFDA_PARTIAL="1",
                  HF_HUB_OFFLINE="1", HF_HOME=tmp_path/"hf")
    for name, value in places.items(): monkeypatch.setenv(name, str(value))
    command = ["reproduce", "unidiffda/table03", "--scale", "paper", "--out", str(tmp_path/"out"),
               "--store", str(tmp_path/"store")]
    for param in ("tasks=[birds-1]", "methods=[real-guidance]", "sweep=[]"): command += ["-p", param]
    assert cli.main(command) == 1
    said = capsys.readouterr().err
    assert IDS["sd15"] in said and "Traceback" not in said and len(said.strip().splitlines()) == 1

@pytest.mark.slow
def test_the_benchmark_runs(tmp_path):
    import subprocess, sys
    script = Path(__file__).parent/"benchmarks"/"speed.py"
    command = [sys.executable, str(script), "--size", "tiny", "--repeats", "1", "--steps", "2",
               "--batches", "1", "4"]
    subprocess.run([*command, "--json", str(tmp_path/"found.json")], check=True)
    found = json.loads((tmp_path/"found.json").read_text())
    assert all(value["per_second"] > 0 for name, value in found.items() if name != "environment")

def check(*methods):
    "Look for the checkpoints of `methods` as `reproduce` does before it starts."
    params = {"scale": "paper", "methods": list(methods), "tasks": ["caltech101"]}
    cli.check_models(cli.planned_runs(paper_notebook("unidiffda/table02"), params))

def test_checkpoints_that_cannot_be_downloaded_stop_the_run_early(models, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DIFFDA_CHECKPOINTS", str(models))
    check("baseline", "real-guidance", "gif", "diffusemix")
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("DIFFDA_CHECKPOINTS", str(tmp_path))
    def find(source, *mirrors): return models if "clip" in source else None
    monkeypatch.setattr("diffda.doctor.find_checkpoint", find)
    check("real-guidance", "diffusemix")
    missing = f"{IDS['sd15']}, {IDS['instruct-pix2pix']}"
    said = f"Checkpoints that are downloaded when their turn comes: {missing}.\n"
    assert capsys.readouterr().out == said
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    check("baseline")
    command = ["reproduce", "unidiffda/table02", "--scale", "paper", "--out", str(tmp_path/"out"),
               "--store", str(tmp_path/"store"), "-p", "methods=[diffusemix]"]
    code, said = cli.main(command), capsys.readouterr().err
    assert code == 1 and "forbids to download" in said and said.count(IDS["instruct-pix2pix"]) == 1
    assert len(said.strip().splitlines()) == 1
