"The papers' tables as `--scale paper` runs them: real notebooks, real loading code, real recipes; only the data and the checkpoints are tiny ones of the same formats, and the counts are cut down."
import json, os

import pandas as pd, pytest, torch, torchvision

import tiny, trees, trees_fine
from diffda import cli
from diffda.method import get_method
from diffda.prompts import SUFFIXES
from diffda.report import paper_notebook

CUT = ["num_copies=1", "epochs=1", "backbone=sd15@64",
       "change={num_inference_steps: 10, TextualInversion.steps: 2, TextualInversion.batch_size: 2, TextualInversion.initializer: the, DreamBoothLoRA.steps: 2, DreamBoothLoRA.batch_size: 2}"]

@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "A folder of tiny checkpoints under the ids of the real ones, and torchvision's file of ImageNet weights (random)."
    root = tmp_path_factory.mktemp("models")
    for kind, name in (("sd15", "stable-diffusion-v1-5/stable-diffusion-v1-5"), ("instruct-pix2pix", "timbrooks/instruct-pix2pix"), ("clip", "openai/clip-vit-base-patch32")):
        tiny.checkpoint(kind, root/name)
    (root/"torch"/"hub"/"checkpoints").mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet50().state_dict(), root/"torch"/"hub"/"checkpoints"/"resnet50-0676ba61.pth")
    return root

def reproduce(item, tasks, models, tmp_path, monkeypatch, *more):
    for k, v in dict(DIFFDA_DATA=tmp_path/"data", DIFFDA_CHECKPOINTS=models, DIFFDA_PARTIAL="1", TORCH_HOME=models/"torch", HF_HUB_OFFLINE="1").items(): monkeypatch.setenv(k, str(v))
    params = [x for p in (f"tasks={tasks}", *CUT, *more) for x in ("-p", p)]
    assert cli.main(["reproduce", f"unidiffda/{item}", "--scale", "paper", "--out", str(tmp_path/"out"), "--store", str(tmp_path/"store"), *params]) == 0
    folder = tmp_path/"out"/"unidiffda"/item
    return folder, pd.read_csv(folder/"table.csv"), [json.loads(l) for l in (folder/"records.jsonl").read_text().splitlines()]

def complete(folder, table, records, methods):
    "All rows are there, from the papers' recipes, beside the paper's numbers."
    assert {r["method"] for r in records} == set(methods) and {r["scale"] for r in records} == {"paper"}
    assert all(r["n_synthetic"] == r["n_real"] for r in records if get_method(r["method"]).generate) and table.paper_mean.notna().sum() >= len(methods)
    assert (folder/"figure.png").exists() and (folder/"claims.json").exists()

FEW = ["baseline", "mixup", "cutmix", "real-guidance", "gif", "diffusemix", "da-fusion", "diff-aug", "diff-mix", "diff-ii"]

def test_table_3_on_birds(models, tmp_path, monkeypatch, capsys):
    trees_fine.birds(tmp_path/"data", classes=3, per_class=4)
    folder, table, records = reproduce("table03", "[birds-1]", models, tmp_path, monkeypatch, "sweep=[]")
    complete(folder, table, records, FEW)
    prompts = {r["method"]: json.loads(open(os.path.join(r["pool"], "metadata.jsonl")).readline())["prompt"] for r in records if r["pool"]}
    assert prompts["real-guidance"] == "a photo of Black_footed_Albatross" and prompts["diff-aug"] == "a photo of a <black_footed_albatross> bird"
    assert any(prompts["diff-ii"].endswith(f"{s}.") for s in SUFFIXES["bird"])
    assert all(r["strength"] == .9 for r in records if r["method"] in ("diff-aug", "diff-mix")) and "paper: Birds 1-shot" in capsys.readouterr().out

@pytest.mark.slow
@pytest.mark.parametrize("item, tree, task, left_out", [("table02", lambda d: trees.caltech101(d, classes=("accordion", "ant"), per_class=33), "caltech101", {"diff-ii"}),
                                                        ("table04", lambda d: trees_fine.aircraft(d), "aircraft-1", set()),
                                                        ("table05", lambda d: trees_fine.blood(d, per_class=8), "blood-5", {"diff-ii", "diffusemix"})])
def test_the_other_tables(item, tree, task, left_out, models, tmp_path, monkeypatch):
    tree(tmp_path/"data")
    more = ["sweep=[]"] if item == "table04" else []
    complete(*reproduce(item, f"[{task}]", models, tmp_path, monkeypatch, *more), [m for m in FEW if m not in left_out])

def test_a_missing_checkpoint_is_one_sentence(models, tmp_path, monkeypatch, capsys):
    trees_fine.birds(tmp_path/"data", classes=2, per_class=4)
    for k, v in dict(DIFFDA_DATA=tmp_path/"data", DIFFDA_CHECKPOINTS=models/"torch", DIFFDA_PARTIAL="1", HF_HUB_OFFLINE="1", HF_HOME=tmp_path/"hf").items(): monkeypatch.setenv(k, str(v))
    assert cli.main(["reproduce", "unidiffda/table03", "--scale", "paper", "-p", "tasks=[birds-1]", "-p", "methods=[real-guidance]", "-p", "sweep=[]", "--out", str(tmp_path/"out"), "--store", str(tmp_path/"store")]) == 1
    said = capsys.readouterr().err
    assert "stable-diffusion-v1-5/stable-diffusion-v1-5" in said and "Traceback" not in said and len(said.strip().splitlines()) == 1

@pytest.mark.slow
def test_the_benchmark_runs(tmp_path):
    import subprocess, sys
    from pathlib import Path
    script = Path(__file__).parent/"benchmarks"/"speed.py"
    subprocess.run([sys.executable, str(script), "--size", "tiny", "--repeats", "1", "--steps", "2", "--batches", "1", "4", "--json", str(tmp_path/"found.json")], check=True)
    assert all(v["per_second"] > 0 for k, v in json.loads((tmp_path/"found.json").read_text()).items() if k != "environment")

def test_checkpoints_that_cannot_be_downloaded_stop_the_run_before_it_starts(models, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DIFFDA_CHECKPOINTS", str(models))
    run = lambda *methods: cli.check_models(cli.planned_runs(paper_notebook("unidiffda/table02"), {"scale": "paper", "methods": list(methods), "tasks": ["caltech101"]}))
    run("baseline", "real-guidance", "gif", "diffusemix")
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("DIFFDA_CHECKPOINTS", str(tmp_path))
    monkeypatch.setattr("diffda.jobs.find_checkpoint", lambda source, *mirrors: models if "clip" in source else None)
    run("real-guidance", "diffusemix")
    assert capsys.readouterr().out == "Checkpoints that are downloaded when their turn comes: stable-diffusion-v1-5/stable-diffusion-v1-5, timbrooks/instruct-pix2pix.\n"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    run("baseline")
    code = cli.main(["reproduce", "unidiffda/table02", "--scale", "paper", "--out", str(tmp_path/"out"), "--store", str(tmp_path/"store"), "-p", "methods=[diffusemix]"])
    said = capsys.readouterr().err
    assert code == 1 and "forbids to download" in said and said.count("timbrooks/instruct-pix2pix") == 1 and len(said.strip().splitlines()) == 1
