"The papers' files: numbers against values read off the paper, the form of the notebooks, and small runs."
import ast, csv, json, math

import nbformat, numpy as np, pandas as pd, pytest

from diffda import cli, report
from diffda.core import DiffDAError
from diffda.data import get_task, list_tasks
from diffda.method import get_method, list_methods
from diffda.papers import (at_equal_steps, came_out, chosen, declared, describe, grid, own_settings, samples,
                           strength_claims, used_better, with_average)
from diffda.places import list_papers, paper_item, paper_notebook, papers_dir
from diffda.report import paper_values

NOTEBOOKS = list_papers()
TABLES = [f"unidiffda/table{n:02d}" for n in (2, 3, 4, 5, 8, 9)]
T2, T3, T4, T5, T8, T9 = TABLES
SHOTS = ("1-shot", "5-shot", "10-shot")

# the papers' numbers

@pytest.mark.parametrize("item, count, methods, datasets", [
    (T2, 36, 9, 4), (T3, 40, 10, 4), (T4, 40, 10, 4), (T5, 32, 8, 4), (T8, 54, 5, 6), (T9, 15, 1, 3)])
def test_csv_shape(item, count, methods, datasets):
    p = paper_values(item)
    assert list(p.columns[:7]) == ["method", "title", "dataset", "setting", "metric", "value", "std"]
    assert (len(p), p.method.nunique(), p.dataset.nunique()) == (count, methods, datasets)
    assert set(p.metric) == {"top1"}
    assert p.value.between(0, 100).all()
    assert not p.duplicated([c for c in p if c not in ("value", "std")]).any()
    assert p["std"].isna().all() or p["std"].dropna().between(0, 12).all()

@pytest.mark.parametrize("item, want, value, std", [
    (T2, dict(method="real-guidance", dataset="Caltech-101"), 67.20, 1.57),
    (T2, dict(method="baseline", dataset="ImageNet-1K"), 22.37, .45),
    (T2, dict(method="diff-mix", dataset="CIFAR-100"), 71.37, .12),
    (T2, dict(method="gif", dataset="Caltech-101"), 76.11, .33),
    (T3, dict(method="baseline", dataset="Birds 5-shot"), 52.24, .85),
    (T3, dict(method="cutmix", dataset="Birds 1-shot"), 12.45, .91),
    (T3, dict(method="diff-mix", dataset="Birds 10-shot"), 73.56, 1.30),
    (T3, dict(method="diff-ii", dataset="Birds average"), 51.53, None),
    (T4, dict(method="diffusemix", dataset="Aircraft 1-shot"), 13.03, 1.32),
    (T4, dict(method="mixup", dataset="Aircraft 10-shot"), 54.12, .14),
    (T4, dict(method="diff-mix", dataset="Aircraft average"), 37.73, None),
    (T4, dict(method="da-fusion", dataset="Aircraft 5-shot"), 33.43, .71),
    (T5, dict(method="cutmix", dataset="Blood 25/class"), 64.58, 10.52),
    (T5, dict(method="gif", dataset="Skin 10/class"), 40.95, .16),
    (T5, dict(method="diff-mix", dataset="Blood 5/class"), 58.03, 4.67),
    (T5, dict(method="real-guidance", dataset="Skin 50/class"), 51.81, .72),
    (T8, dict(method="gif", dataset="CIFAR-100", utilize="fr"), 31.78, None),
    (T8, dict(method="diff-aug", dataset="Birds (full)", utilize="fc"), 66.79, None),
    (T8, dict(method="diff-ii", dataset="Birds 5-shot", utilize="grr"), 61.38, None),
    (T8, dict(method="baseline", dataset="Birds 10-shot"), 69.94, None),
    (T9, dict(method="real-guidance", dataset="ImageNet-100", strength=.7), 76.70, None)])
def test_csv_values(item, want, value, std):
    hit = report.select(paper_values(item), want)
    assert len(hit) == 1 and hit.value.iloc[0] == value
    assert math.isnan(hit["std"].iloc[0]) if std is None else hit["std"].iloc[0] == std

def test_csv_means():
    "Column means, added up on paper."
    means = paper_values(T2).groupby("dataset").value.mean()
    assert means["Caltech-101"] == pytest.approx(571.20/9) and means["ImageNet-1K"] == pytest.approx(304.18/9)
    assert paper_values(T5).groupby("dataset").value.mean()["Skin 50/class"] == pytest.approx(398.37/8)

@pytest.mark.parametrize("item, data, printed_otherwise", [
    (T3, "Birds", {}), (T4, "Aircraft", {"diff-mix": 37.73})])
def test_the_average_is_the_mean_of_the_shots(item, data, printed_otherwise):
    "To the last printed digit, rounded or cut off; but for one average that the paper has wrong."
    wide = paper_values(item).pivot(index="method", columns="dataset", values="value")
    exact = wide[[f"{data} {s}" for s in SHOTS]].mean(axis=1)
    off = wide[f"{data} average"][(wide[f"{data} average"] - exact).abs() > .00701]
    assert off.to_dict() == printed_otherwise
    assert paper_values(item).query(f"dataset == '{data} average'")["std"].isna().all()

def test_the_same_cells_in_two_tables():
    "Diff-II's rows with local replacement are those of Table 3; so are DiffuseMix's with more than one shot."
    three, eight = paper_values(T3), paper_values(T8)
    def same(method, shots):
        cell = {"method": method, "dataset": f"Birds {shots}"}
        first, second = report.select(three, cell), report.select(eight, {**cell, "utilize": "lrr"})
        return first.value.iloc[0] == second.value.iloc[0]
    assert all(same("diff-ii", s) for s in SHOTS)
    assert [same("diffusemix", s) for s in SHOTS] == [False, True, True]

def test_titles_and_names_agree():
    for item in TABLES:
        p = paper_values(item)
        assert ((p.title.str.lower().str.replace(" ", "-")) == p.method).all()
        for name, title in set(zip(p.method, p.title)):
            if name in list_methods(): assert get_method(name).title == title

def test_every_task_stands_beside_a_column_of_a_table():
    "Or beside a column of a table or figure that has no notebook yet; these are all of them."
    columns = set().union(*(paper_values(i).dataset for i in TABLES))
    # figures over the number of shots, wide classes, other domains
    curves = {f"Caltech-101 {n}-shot" for n in (1, 2, 4, 8, 16)} | {f"Birds {n}-shot" for n in (2, 4, 8, 16)}
    to_come = {*curves, "Semi-iNat species", "Semi-iNat family", "Semi-iNat order", "DomainNet"}
    assert {get_task(t).counterpart for t in list_tasks("nano")} - columns == to_come

def test_numbers_are_written_as_printed():
    "Two decimals, as in the papers, so that a difference from the print can be seen."
    for item in TABLES:
        with open(papers_dir()/f"{item}.csv", newline="", encoding="utf-8") as f:
            cells = [c for r in csv.DictReader(f) for c in (r["value"], r["std"]) if c]
        assert cells and all(len(c.partition(".")[2]) == 2 for c in cells)

# the papers' notebooks

def source(item): return nbformat.read(paper_notebook(item), nbformat.NO_CONVERT)

def annotated(item) -> dict:
    "{parameter: default} of a notebook, from its tagged cell; each is an annotated literal with a comment."
    cell, = [c for c in source(item).cells if "parameters" in c.metadata.get("tags", [])]
    names = {}
    for node, line in zip(ast.parse(cell.source).body, cell.source.splitlines(), strict=True):
        assert isinstance(node, ast.AnnAssign), f"{line!r} has no type"
        value = ast.literal_eval(node.value)
        assert type(value).__name__ == node.annotation.id and "  # " in line, line
        names[node.target.id] = value
    return names

def test_the_notebooks_of_these_tables_are_there(): assert set(TABLES) <= set(NOTEBOOKS)

@pytest.mark.parametrize("item", NOTEBOOKS)
def test_form(item):
    nb = source(item)
    nbformat.validate(nb)
    assert (nb.nbformat, nb.nbformat_minor) == (4, 5) and len({c.id for c in nb.cells}) == len(nb.cells)
    first = nb.cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    assert f"blob/main/papers/{item}.ipynb" in first.source
    code = [c for c in nb.cells if c.cell_type == "code"]
    assert all(c.outputs == [] and c.execution_count is None for c in code)
    for c in code:
        ast.parse(c.source)
        if "parameters" not in c.metadata.get("tags", []): assert max(map(len, c.source.splitlines())) <= 110
    names = annotated(item)
    assert (names["scale"], names["store"], names["out"]) == ("nano", "", "results")
    assert names["seeds"] in ([0], [0, 1, 2]) and declared(item) == names
    text = "\n".join(c.source for c in code)
    assert f'"{item}"' in text and "save_results(" in text
    unused = [n for n in names if text.count(n) < 2]
    assert not unused, f"parameters without an effect: {unused}"

@pytest.mark.parametrize("item", NOTEBOOKS)
def test_papermill_sees_the_parameters(item):
    import papermill
    found = papermill.inspect_notebook(str(paper_notebook(item)))
    assert {"scale", "methods", "tasks", "seeds", "store", "out"} <= set(found)
    assert all(p["help"] for p in found.values())

@pytest.mark.parametrize("item", TABLES[:5])
def test_the_rows_are_the_papers(item):
    "The default methods are the rows of the paper's table, in its order."
    names = annotated(item)
    paper = list(dict.fromkeys(paper_values(item).method))
    if item == T8: assert {*names["methods"], *names["few_shot_methods"], "baseline"} == set(paper)
    else: assert names["methods"] == paper

@pytest.mark.parametrize("item", TABLES)
def test_the_default_tasks_stand_beside_the_papers_columns(item):
    text = "\n".join(c.source for c in source(item).cells if c.cell_type == "code")
    nano = [t for t in list_tasks("nano") if f'"{t}"' in text]
    assert nano and {get_task(t).counterpart for t in nano} <= set(paper_values(item).dataset)

# what the notebooks have in common

def test_a_notebook_by_its_path(tmp_path):
    mine = tmp_path/"mine"/"figure07.ipynb"
    mine.parent.mkdir()
    mine.write_text(json.dumps({"cells": []}))
    assert paper_notebook(mine) == paper_notebook(str(mine)) == mine and paper_item(mine) == "mine/figure07"
    assert declared(mine) == {} and paper_item(T2) == T2 and paper_item(paper_notebook(T2)) == T2

@pytest.mark.parametrize("name, says", [
    ("unidifda/table02", T2), ("/nowhere/table02.ipynb", "/nowhere/table02.ipynb")])
def test_an_unknown_item_is_one_sentence(name, says):
    with pytest.raises(DiffDAError) as e: paper_notebook(name)
    assert says in str(e.value) and "\n" not in str(e.value)

def test_chosen_leaves_out_what_is_empty():
    assert chosen({"p": 0.}, 2, num_copies=0, utilize="", epochs=5, p=.5) \
        == {"num_copies": None, "utilize": None, "epochs": 5, "p": 0., "safety": 2}

def test_grid_is_every_combination_once():
    vary = {"utilize": ["fc", "fr"], "num_copies": [1, 2]}
    runs = grid(["baseline", "real-guidance"], ["nano-fashion"], [0, 1], vary, epochs=2)
    drawing = [(r.method, r.seed) for r in runs if r.method.generate]
    found = [(method.utilize.name, method.generate.num_copies, seed) for method, seed in drawing]
    assert len(found) == len(set(found)) == 8
    assert grid(["mixup"], [], [0]) == grid(["mixup"], ["nano-fashion"], [0], {"strength": []}) == []
    assert describe([]) == "Nothing to run."

def test_grid_with_equal_steps():
    runs = grid(["baseline", "mixup"], ["nano-fashion"], [0], equal_steps=True)
    assert [r.equal for r in runs] == ["epochs", "epochs", "steps"]
    methods = "Baseline, Mixup, Baseline (equal steps)"
    assert describe(runs) == f"3 classifiers at nano scale: {methods} on nano-fashion with 1 seed."
    assert len(grid(["mixup"], ["nano-fashion"], [0], equal_steps=True)) == 1

def test_own_settings():
    shown = own_settings(grid(["baseline", "real-guidance"], ["nano-digits-1", "nano-digits-5"], [0, 1]))
    assert list(shown.columns) == ["method", "task", "utilize", "p", "strength"] and len(shown) == 2
    assert set(shown.strength) == {.1}

def test_samples_of_one_seed(tmp_path, monkeypatch):
    from diffda import papers
    drawn = []
    monkeypatch.setattr(papers, "SyntheticPool", lambda folder: folder)
    monkeypatch.setattr(papers, "get_split", lambda task, seed: (task, seed))
    monkeypatch.setattr(papers, "image_grid", lambda split, pools, **k: drawn.append((split, pools, k)))
    made = dict(title="GIF", strength=.5)
    rows = [dict(made, seed=s, task=t, pool=f"{t}-{s}") for t in ("a", "b") for s in (0, 1)]
    rows.append(dict(seed=0, task="a", title="Baseline", strength=None, pool=None))
    assert list(samples(pd.DataFrame(rows), 1)) == ["samples", "samples-b"]
    assert drawn[0] == (("a", 1), {"GIF": "a-1"}, {})
    samples(pd.DataFrame(rows), 0, by="strength", copies=1)
    assert drawn[-1] == (("b", 0), {"strength 0.5": "b-0"}, {"copies": 1})

def test_with_average_needs_all_shots():
    gif = dict(method="gif", title="GIF", seed=0)
    rows = [dict(gif, task=f"t{n}", counterpart=f"Birds {n}-shot", top1=float(n)) for n in (1, 5, 10)]
    assert with_average(pd.DataFrame(rows), T3, "Birds").top1.tolist() == [1, 5, 10, pytest.approx(16 / 3)]
    assert len(with_average(pd.DataFrame(rows[:2]), T3, "Birds")) == 2
    assert len(with_average(pd.DataFrame(rows), T3, "Aircraft")) == 3

def test_claims_that_come_again():
    assert [c.a["method"] for c in at_equal_steps(["baseline", "mixup", "gif"], family="medical")] == ["gif"]
    assert used_better("gif", "fc", ["fc"], "s") is None
    claim = used_better("gif", "fc", ["fr", "lrr"], "s", task={"t"})
    assert [b["utilize"] for b in claim.b] == ["fr", "lrr"] and claim.where == {"task": {"t"}}
    assert strength_claims([.1], "s") == []
    assert [c.at for c in strength_claims([.9, .1], "s")[:2]] == ["lowest", "highest"]

def test_what_came_out_is_for_the_defaults_only():
    usual = declared(T4)
    other_seeds = {**usual, "seeds": [0, 1], "store": "x"}
    assert came_out(T4, other_seeds, "\nIt was so.\n").data.endswith("It was so.")
    other = came_out(T4, {**usual, "epochs": 3, "scale": "paper"}, "It was so.").data
    assert "It was so" not in other and "`epochs = 3`" in other and "`scale = 'paper'`" in other

# claims that these notebooks make, against the paper's own numbers

def claims_of(item, **parameters) -> list:
    "The verdicts of a notebook's claims on records that are the paper's own numbers."
    names = {**declared(item), **parameters, "display": lambda *a: None}
    cells = [c for c in source(item).cells if c.cell_type == "code" and "get_ipython" not in c.source]
    exec(cells[1].source, names)
    paper = paper_values(item)
    tasks = {get_task(t).counterpart: get_task(t) for t in list_tasks("paper")}
    def record(row, seed):
        # none for an average, which is of few shots
        task = tasks.get(row["dataset"])
        return {"method": row["method"], "title": row["title"], "counterpart": row["dataset"],
                "top1": row["value"], "task": task.name if task else "average", "seed": seed,
                "scale": "paper", "family": task.family if task else "fine-grained", "equal": "epochs"}
    rows = [record(r, s) for r in paper.to_dict("records") for s in (0, 1)]
    names["records"] = names["shown"] = pd.DataFrame(rows)
    cell, = [c for c in cells if "claims = [" in c.source]
    exec(cell.source, names)
    return names["verdicts"]

@pytest.mark.parametrize("item", [T2, T3, T4, T5])
def test_claims_judge_the_papers_numbers(item):
    "Records that are the paper's own numbers get the verdict that the paper's numbers get."
    verdicts = claims_of(item, scale="paper")
    assert len(verdicts) >= 8 and {v.verdict for v in verdicts} <= {"holds", "fails"}
    for v in verdicts: assert v.paper_verdict == v.verdict and v.paper == pytest.approx(v.difference), str(v)

def test_what_the_papers_tables_contradict():
    "Few sentences, and they are known: with one shot, Diff-Aug on Birds and Diff-II on Aircraft."
    def against(item):
        return {(v.claim, v.counterpart) for v in claims_of(item, scale="paper") if v.verdict == "fails"}
    assert against(T2) == against(T5) == set()
    assert against(T3) == {("Diff-Aug beats DA-Fusion: a LoRA and words only", "Birds 1-shot")}
    assert against(T4) == {("Diff-II beats Diff-Aug", "Aircraft 1-shot")}

# small runs of the notebooks, without tuned methods, whose training has its own tests

RUNS = {T2: ["methods=[baseline, mixup, real-guidance]"],
        T3: ["methods=[baseline, real-guidance]"],
        T4: ["methods=[baseline, real-guidance]", "sweep=[]", "utilize=lrr"],
        T5: ["methods=[baseline, real-guidance]", "tasks=[nano-scans-5, nano-stains-10]"],
        T8: ["methods=[real-guidance]", "few_shot_methods=[real-guidance]", "few_shot_tasks=[nano-digits-1]"],
        T9: ["strengths=[0.1, 0.5]", "seeds=[0]"]}

def run(item, tmp_path, *more):
    "What the small run of a table leaves: (the folder, its table, its claims)."
    params = ["epochs=1", "num_copies=1", *RUNS[item], *more]
    folder = cli.reproduce(item, out=tmp_path/"out", store=tmp_path/"store", params=params)
    assert (folder/f"{item.split('/')[1]}.ipynb").exists() and (folder/"figure.png").exists()
    return folder, pd.read_csv(folder/"table.csv"), json.loads((folder/"claims.json").read_text())

def check(item, table, claims):
    assert set(table.scale) == {"nano"} and table["mean"].between(0, 100).all() and set(table.n) == {1}
    # one seed decides nothing
    assert {c["verdict"] for c in claims} <= {"undecided"} and all(c["n"] == 1 for c in claims)
    if "share" not in table: return
    assert table[table.method != "baseline"].share.dropna().between(0, 100).all()
    assert table[table.method == "baseline"].share.isna().all()

def test_table_3_in_small(tmp_path, capsys):
    folder, table, claims = run(T3, tmp_path)
    check(T3, table, claims)
    assert set(table.task) == {"nano-digits-1", "nano-digits-5", "nano-digits-10", "average"}
    average = table[table.task == "average"].set_index("method")
    others = table[table.task != "average"].groupby("method")["mean"].mean()
    assert np.allclose(average["mean"], others[average.index], atol=1e-3)
    assert average.paper_mean["baseline"] == 46.13
    swept = pd.read_csv(folder/"sweep"/"table.csv")
    assert swept.strength.tolist() == [.1, .9] and set(swept.task) == {"nano-digits-5"}
    assert any("low strength" in c["claim"] for c in claims) and "Birds average" in capsys.readouterr().out

@pytest.mark.slow
@pytest.mark.parametrize("item", [T2, T4, T5, T8, T9])
def test_small_run(item, tmp_path):
    folder, table, claims = run(item, tmp_path)
    check(item, table, claims)
    # Table 4 has no claim about Real Guidance and the baseline alone
    assert claims or item == T4
    if item == T4:
        assert set(table.counterpart) == {f"Aircraft {s}" for s in (*SHOTS, "average")}
        assert not (folder/"sweep").exists()
    if item == T5: assert set(table.row) == {"Baseline", "Baseline (equal steps)", "Real Guidance"}
    if item == T8:
        assert set(table.utilize.dropna()) == {"fc", "fr", "lrr", "grr"}
        assert set(table.task) == {"nano-fashion", "nano-digits-1"}

def test_an_unknown_task_is_one_sentence(tmp_path, capsys):
    command = ["reproduce", T4, "--out", str(tmp_path/"out"), "--store", str(tmp_path/"store")]
    assert cli.main([*command, "-p", "methods=[baseline]", "-p", "tasks=[nano-outline-5]"]) == 2
    error = capsys.readouterr().err.strip()
    assert "nano-outlines-5" in error and "\n" not in error
