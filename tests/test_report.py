"Tables, figures and verdicts: values worked out by hand or by another way of computing."
import itertools, json, math

import numpy as np, pandas as pd, pytest

from diffda import report
from diffda.core import DiffDAError
from diffda.places import papers_dir
from diffda.report import (BestAt, Claim, Equivalent, Interaction, NoBest, PerClass, Ratio, Unjudged, Verdict,
                           add_average, beats, bootstrap_interval, by_domain, dots, heat_map, image_grid,
                           assess, assess_all, lines, paper_table, paper_values, save_results,
                           select, show, t_interval, t_quantile, table, text_table, tidy, verdict_table, wide)

T2, T3, T8, T9, T17 = (f"unidiffda/table{n}" for n in ("02", "03", "08", "09", "17"))
NAN = float("nan")

def rows(method, title, top1, **settings):
    "Made-up records, one per seed."
    base = dict(method=method, title=title, task="nano-fashion", counterpart="Caltech-101", scale="nano",
                family="conventional", utilize="fc", p=NAN, strength=.9, num_copies=5, equal="epochs",
                n_synthetic=1250, per_class=[.5, .6], best_val=NAN)
    if method == "baseline": base.update(utilize="none", strength=NAN, num_copies=0, n_synthetic=0)
    return [{**base, **settings, "seed": s, "top1": v} for s, v in enumerate(top1)]

def frame(*parts): return pd.DataFrame([r for p in parts for r in p])

def baseline(*top1, **settings): return rows("baseline", "Baseline", top1, **settings)

def guidance(*top1, **settings): return rows("real-guidance", "Real Guidance", top1, **settings)

BASE = {"method": "baseline", "equal": "epochs"}
RG = {"method": "real-guidance"}

@pytest.fixture
def records(): return frame(baseline(79., 80., 81.5), guidance(82., 82., 85.))

@pytest.fixture
def strategies():
    used = {"fc": (83., 84., 85.), "fr": (78., 79., 80.), "lrr": (82., 83., 82.), "grr": (84., 83., 83.)}
    return frame(baseline(79., 80., 81.),
                 *(guidance(*v, utilize=u, p=.5 if u.endswith("rr") else NAN) for u, v in used.items()))

@pytest.fixture
def papers(tmp_path, monkeypatch):
    "A folder of papers for made-up tables: `papers('toy/table06', 'header', 'row', …)` writes one."
    monkeypatch.setattr("diffda.places.papers_dir", lambda: tmp_path/"papers")
    def write(item, *lines):
        path = tmp_path/"papers"/f"{item}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n")
        return item
    return write

HEAD = "method,title,dataset,setting,metric,value,std"

# tables

def test_table_golden(records):
    t = table(records, T2)
    assert list(t.columns) == ["method", "task", "metric", "mean", "std", "n", "row", "title", "scale",
                               "counterpart", "paper_mean", "paper_std"]
    b, r = t.to_dict("records")
    mean = 240.5 / 3
    assert (b["mean"], r["mean"]) == (pytest.approx(mean), 83.0)
    assert b["std"] == pytest.approx(math.sqrt(((79 - mean)**2 + (80 - mean)**2 + (81.5 - mean)**2) / 2))
    assert r["std"] == pytest.approx(math.sqrt(3)) and (b["n"], r["n"]) == (3, 3)
    assert (r["paper_mean"], r["paper_std"]) == (67.20, 1.57)
    assert (b["paper_mean"], b["paper_std"]) == (49.95, 3.94)

def test_one_seed_has_no_std(records):
    t = table(records[records.seed == 1], T2)
    text = text_table(t)
    assert t["std"].isna().all() and set(t.n) == {1} and "1 seed" in text and "±" not in text.splitlines()[0]

def test_equal_steps_row(records):
    both = pd.concat([records, pd.DataFrame(baseline(80., 81., 82., equal="steps"))])
    t = table(both, T2).set_index("row")
    assert t.loc["Baseline (equal steps)", "mean"] == 81
    assert math.isnan(t.loc["Baseline (equal steps)", "paper_mean"])
    assert t.loc["Baseline", "paper_mean"] == 49.95
    # the paper has no such run, also where nothing else is in the table
    assert table(both[both.equal == "steps"], T2).paper_mean.isna().all()

def test_table8_axis_is_utilize_only(strategies):
    t = table(strategies, T8)
    # p goes with the strategy and tells no rows apart
    assert list(t.columns[6:8]) == ["utilize", "row"]
    assert list(t.row) == ["Baseline", *(f"Real Guidance, {u}" for u in ("fc", "fr", "lrr", "grr"))]
    # Real Guidance is not in the paper's Table 8
    assert t.paper_mean.tolist()[0] == 49.95 and t.paper_mean[1:].isna().all()
    gif = strategies.assign(method=strategies.method.replace("real-guidance", "gif"))
    assert table(gif, T8).paper_mean.tolist() == [49.95, 76.11, 51.43, 56.37, 55.62]

def test_other_metrics(records):
    t = table(records.assign(best_test=records.top1 + 1, top5=99.), T2, "best_test").set_index("method")
    assert t.loc["real-guidance", "mean"] == 84 and t.loc["real-guidance", "paper_mean"] == 67.20
    assert table(records.assign(top5=99.), T2, "top5").paper_mean.isna().all()
    nothing = table(records, T2, "best_val")                          # a task without validation images
    assert set(nothing.n) == {0} and "–" in text_table(nothing)

def test_wide_text_names_the_scale(records):
    two = pd.concat([records, records.assign(task="nano-fashion-100", counterpart="CIFAR-100")])
    text = text_table(table(two, T2))
    parts = ("nano scale", "nano-fashion-100", "paper: CIFAR-100", "83.00 ± 1.73", "66.69 ± 0.53", "3 seeds")
    assert all(part in text for part in parts)
    html = show(table(two, T2)).to_html()
    assert "nano scale" in html and "66.69" in html
    # two tasks beside the same dataset
    show(table(pd.concat([records, records.assign(task="other")]), T2)).to_html()

def test_text_from_a_csv_file(records, tmp_path):
    folder = save_results(T2, tmp_path, records, table(records, T2))
    assert "83.00 ± 1.73" in text_table(pd.read_csv(folder/"table.csv"))
    bare = pd.DataFrame([dict(method="baseline", task="t", metric="top1", mean=1., std=NAN, n=1,
                              counterpart="C", paper_mean=2., paper_std=NAN)])
    assert "2.00" in text_table(bare)

# the axes

def axes_of(*parts, item="unidiffda/figure99"): return tidy(frame(*parts), item).attrs["axes"]

def test_extra_axis_is_found(records):
    more = pd.concat([records, pd.DataFrame(guidance(83., 83., 83., num_copies=10))])
    assert set(table(more, T2).row) == {"Baseline", "Real Guidance, 5 copies", "Real Guidance, 10 copies"}

def test_equal_steps_explain_the_epochs():
    assert axes_of(baseline(1., epochs=10), baseline(2., epochs=60, equal="steps")) == ["equal"]

def test_the_preferred_setting_is_named():
    assert axes_of(guidance(1., lr=.1, epochs=3), guidance(2., lr=.2, epochs=5)) == ["lr"]
    assert axes_of(guidance(1., zeta=1, alpha=1), guidance(2., zeta=2, alpha=2)) == ["alpha"]

def test_two_axes_where_one_is_not_enough():
    grid = [guidance(1., num_inference_steps=t, lcm=l) for t, l in ((25, False), (5, False), (5, True))]
    t = tidy(frame(*grid), T2)
    assert t.attrs["axes"] == ["num_inference_steps", "lcm"]
    steps = ("25 steps, no lcm", "5 steps, no lcm", "5 steps, lcm")
    assert list(t.row) == [f"Real Guidance, {s}" for s in steps]

def test_settings_of_strangers_and_measurements():
    "An unknown column that differs within a seed is a setting, one that differs between seeds is not."
    a, b = guidance(1., 2., **{"Grain.size": 3}), guidance(3., 4., **{"Grain.size": 4})
    measured = frame(a, b).assign(fid=[1., 2., 3., 4.])
    assert tidy(measured[:2], T2).attrs["axes"] == []
    assert tidy(measured, T2, ["top1", "fid"]).attrs["axes"] == ["Grain.size"]
    assert set(tidy(measured, T2, "fid").row) == {f"Real Guidance, Grain.size={n}" for n in (3, 4)}

def test_a_known_setting_that_differs_between_seeds_is_not_averaged():
    mixed = frame(guidance(1., strength=.1), [{**guidance(2., strength=.9)[0], "seed": 1}])
    assert list(tidy(mixed, T2).row) == ["Real Guidance, s=0.1", "Real Guidance, s=0.9"]

def test_settings_that_are_lists():
    r = frame(guidance(1., strength=[.25, .5]), guidance(2., strength=(.1, .2)), guidance(3., strength=.9))
    assert list(table(r, T2).row) == [f"Real Guidance, {s}" for s in ("0.25/0.5", "0.1/0.2", "s=0.9")]
    assert len(select(r, {"strength": [.25, .5]})) == 1

def test_a_baseline_has_no_generator():
    "Nor a strength, whatever it was planned with; what tells its own runs apart stays."
    plain = baseline(1., backbone="sd15", strength=.9, utilize="fc")
    two = guidance(2., backbone="sd15"), guidance(3., backbone="sd21")
    found = tidy(frame(plain, *two), T2)
    assert list(found.row) == ["Baseline", "Real Guidance, sd15", "Real Guidance, sd21"]
    nets = [f(v, classifier=c) for f, v in ((baseline, 1.), (guidance, 2.)) for c in ("resnet50", "vit")]
    assert list(tidy(frame(*nets), T2).row) == [f"{t}, {c}" for t in ("Baseline", "Real Guidance")
                                                for c in ("resnet50", "vit")]

def test_one_classifier_planned_twice_counts_once():
    twice = frame(baseline(1., 2., key="a", backbone="sd15"), baseline(1., 2., key="a", backbone="sd21"))
    twice["key"] = twice.key + twice.seed.astype(str)
    t = table(twice, T2)
    assert list(t.row) == ["Baseline"] and list(t.n) == [2]
    assert assess(Claim("x", "y", BASE, BASE), twice)[0].n == 2

def test_rows_that_are_called_alike():
    r = frame(rows("mine", "Mine", [1.]), rows("mine-2", "Mine", [2.]))
    assert list(table(r, T2).row) == ["Mine [mine]", "Mine [mine-2]"]

# rows, columns and several metrics

def test_several_metrics(records):
    t = table(records.assign(top5=90.), T2, ["top1", "top5", "n_synthetic"])
    assert list(dict.fromkeys(t.metric)) == ["top1", "top5", "n_synthetic"] and len(t) == 6
    assert t[t.metric == "top5"].paper_mean.isna().all()
    w = wide(t)
    assert w.loc["Real Guidance", "nano-fashion (nano scale), top-5 %"] == "90.00 ± 0.00"
    assert w.loc["Real Guidance", "paper: Caltech-101, top-1 %"] == "67.20 ± 1.57"
    assert "top-1 %; top-5 %; synthetic images" in text_table(t).splitlines()[0]

def test_columns_by_an_axis(strategies):
    t = table(strategies, T8)
    w = wide(t, columns="utilize")
    assert list(w.index) == ["Baseline", "Real Guidance"]
    assert w.loc["Real Guidance", "nano-fashion (nano scale), lrr"] == "82.33 ± 0.58"
    assert w.loc["Baseline", "nano-fashion (nano scale), no utilize"] == "80.00 ± 1.00"
    swapped = wide(t, rows=["utilize"])
    assert swapped.loc["lrr", "nano-fashion (nano scale), Real Guidance"] == "82.33 ± 0.58"
    assert "80.00" in show(t, columns="utilize").to_html()
    with pytest.raises(DiffDAError, match="utilize"): wide(t, columns="utilise")

def test_hours(records):
    timed = records.assign(seconds_generate=[NAN]*3 + [3600.]*3, seconds_train=1800., counterpart="CIFAR-100")
    t = table(timed, T17, ["hours_generate", "hours_train", "hours"])
    got = t.set_index(["method", "metric"])
    assert got["mean"]["real-guidance"].tolist() == [1, .5, 1.5]
    assert got["mean"]["baseline"].tolist() == [0, .5, .5]
    assert got.paper_mean["real-guidance"].tolist() == [7.70, 2.26, 9.96]

def test_domains(papers):
    also = {"sketch": {"top1": 20., "top5": 40., "per_class": [.2]}, "clipart": {"top1": 10.}}
    r = frame(guidance(50., also=also, counterpart="DomainNet"), baseline(40., counterpart="DomainNet"))
    item = papers("toy/table07", HEAD + ",domain", "real-guidance,Real Guidance,DomainNet,,top1,42.14,,real",
                  "real-guidance,Real Guidance,DomainNet,,top1,11.36,,sketch")
    t = table(by_domain(r, "real"), item)
    got = t[t.method == "real-guidance"].set_index("domain")
    assert got["mean"].to_dict() == {"real": 50., "sketch": 20., "clipart": 10.}
    assert got.paper_mean[["real", "sketch"]].tolist() == [42.14, 11.36]
    assert math.isnan(got.paper_mean["clipart"])
    w = wide(t, columns="domain")
    assert w.loc["Real Guidance", "nano-fashion (nano scale), sketch"] == "20.00"
    assert w.loc["Real Guidance", "paper: DomainNet, sketch"] == "11.36"

# the paper's tables, of all shapes

def test_paper_table():
    two, eight = paper_table(T2), paper_table(T8)
    assert two.loc["Real Guidance", "Caltech-101"] == "67.20 ± 1.57" and two.index[0] == "Baseline"
    assert eight.loc["GIF, lrr", "Birds 1-shot"] == "–" and eight.loc["GIF, lrr", "Birds (full)"] == "42.06"
    assert paper_table(T8, columns="utilize").loc["GIF", "Birds (full), lrr"] == "42.06"
    t = paper_table(T17)
    assert (t.loc["Diff-Aug", "all, FT"], t.loc["GIF", "CIFAR-100, TOTAL"], len(t)) == ("3.26", "11.47", 7)

def test_two_metrics_and_a_setting(papers, records):
    "As Table 6: one dataset, three label granularities, top-1 and top-5."
    numbers = ("species,top1,41.88", "species,top5,64.15", "order,top1,54.96", "order,top5,79.43")
    item = papers("toy/table06", HEAD, *(f"baseline,Baseline,Semi-iNat,{n}," for n in numbers))
    t = paper_table(item)
    assert t.shape == (1, 4) and t.loc["Baseline", "Semi-iNat, order, top-5 %"] == "79.43"
    ours = table(records.assign(counterpart="Semi-iNat order", top5=90.), item, ["top1", "top5"])
    assert ours[ours.method == "baseline"].paper_mean.tolist() == [54.96, 79.43]

def test_other_metrics_in_the_paper(papers, records):
    "As Tables 13 to 15: four metrics of the images, some of which the baseline lacks."
    item = papers("toy/table13", HEAD, "baseline,Baseline,Caltech-101,,acc,0.50,",
                  "real-guidance,Real Guidance,Caltech-101,,fid,42.79,",
                  "real-guidance,Real Guidance,Caltech-101,,recall,0.28,")
    assert paper_table(item).loc["Baseline"].tolist() == ["0.50", "–", "–"]
    ours = table(records.assign(fid=[NAN]*3 + [40., 41., 42.], recall=.3), item, ["fid", "recall"])
    got = ours[ours.method == "real-guidance"].set_index("metric")
    assert got["mean"]["fid"] == 41 and got.paper_mean.to_dict() == {"fid": 42.79, "recall": .28}

def test_further_axes(papers):
    "As Tables 16 and 19: a classifier, or denoising steps and LCM; numbers are found by all axes."
    item = papers("toy/table16", HEAD + ",classifier",
                  "baseline,Baseline,Caltech-101,scratch,top1,60.11,,mobilenet",
                  "baseline,Baseline,Caltech-101,scratch,top1,26.29,,vit",
                  "real-guidance,Real Guidance,Caltech-101,scratch,top1,33.71,,vit")
    assert paper_table(item, columns="classifier").loc["Baseline", "Caltech-101, mobilenet"] == "60.11"
    t = table(frame(baseline(50., classifier="vit"), guidance(51., classifier="vit")), item)
    assert t.paper_mean.tolist() == [26.29, 33.71]
    item = papers("toy/table19", HEAD + ",num_inference_steps,lcm",
                  *(f"real-guidance,Real Guidance,Caltech-101,,top1,{n}"
                    for n in ("65.38,,25,False", "64.25,,5,False", "63.0,,5,True")))
    three = ((25, False), (5, False), (5, True))
    ours = frame(*(guidance(70., num_inference_steps=s, lcm=l) for s, l in three))
    assert table(ours, item).paper_mean.tolist() == [65.38, 64.25, 63.0]
    assert paper_table(item).index.tolist()[2] == "Real Guidance, 5 steps, lcm"
    which_of_the_three = ours[:1].drop(columns=["num_inference_steps", "lcm"])
    assert table(which_of_the_three, item).paper_mean.isna().all()

# the share of recognised images, and the average over tasks

def test_share_stands_beside_the_accuracy(records, tmp_path):
    seen = records.assign(share=[None]*3 + [90., 80., 85.])
    t = table(seen, T2)
    assert t.columns[-1] == "share" and math.isnan(t.share[0]) and t.share[1] == pytest.approx(85)
    text = text_table(t)
    assert "recognised %" in text.splitlines()[1] and " 85.0 " in text
    assert "reference classifier" in text.splitlines()[0]
    assert "recognised" in show(t).to_html()
    again = pd.read_csv(save_results(T2, tmp_path, seen, t)/"table.csv")
    assert again.share[1] == 85 and "85.0" in text_table(again)
    for none in (records, records.assign(share=None), records.assign(share=NAN)):
        assert "share" not in table(none, T2) and "recognised" not in text_table(table(none, T2))

def test_share_of_one_task_only(records):
    "A task without a reference has no such column, the others keep theirs."
    other = records.assign(task="other", counterpart="CIFAR-100", share=NAN)
    found = wide(table(pd.concat([records.assign(share=50.), other]), T2))
    assert list(found.columns) == ["nano-fashion (nano scale)", "recognised %", "paper: Caltech-101",
                                   "other (nano scale)", "paper: CIFAR-100"]

def test_many_tasks_come_below_each_other(records):
    t = table(pd.concat([records.assign(task=f"task-{i}") for i in range(5)]), T2)
    found = text_table(t).splitlines()
    assert sum(l.startswith("Baseline") for l in found) == 3 and max(map(len, found[1:])) < 120
    assert all(f"task-{i}" in "\n".join(found) for i in range(5))

def test_item_without_numbers_has_no_column_for_them(records):
    assert list(wide(table(records, "unidiffda/figure04")).columns) == ["nano-fashion (nano scale)"]

@pytest.fixture
def three_tasks():
    "Baseline 40 and 50, GIF 43 and 55 on one task; 10 and 20 more on the others, twice as much for seed 1."
    def part(task, up, name, title, first, second):
        return rows(name, title, [first + up, second + 2*up], task=task, counterpart=f"Birds {task}",
                    p=.1 if task == "a" else .5, share=80. + up, n_real=5)
    methods = (("baseline", "Baseline", 40., 50.), ("gif", "GIF", 43., 55.))
    return frame(*(part(t, up, *m) for t, up in (("a", 0.), ("b", 10.), ("c", 20.)) for m in methods))

def test_average(three_tasks):
    "By hand: the mean over three tasks, per seed."
    got = add_average(three_tasks, T3, "Birds average")
    n = len(three_tasks)
    assert got[:n].top1.tolist() == three_tasks.top1.tolist()
    assert list(got.columns) == list(three_tasks.columns)
    mean = got[got.task == "average"]
    assert mean.set_index(["method", "seed"]).top1.to_dict() == {("baseline", 0): 50., ("baseline", 1): 70.,
                                                                 ("gif", 0): 53., ("gif", 1): 75.}
    found = {c: set(mean[c]) for c in ("share", "counterpart", "family", "n_real", "seed")}
    assert found == {"share": {90.}, "counterpart": {"Birds average"}, "family": {"conventional"},
                     "n_real": {15}, "seed": {0, 1}}
    # what differs between tasks, or is missing on one, is left out
    assert mean.p.isna().all() and mean.best_val.isna().all()
    t = table(got, T3)
    paper = t[t.task == "average"].set_index("method").paper_mean
    assert not {"p", "strength"} & set(t.columns) and paper.to_dict() == {"baseline": 46.13, "gif": 45.72}
    v = [v for v in assess(Claim("x", "y", {"method": "gif"}, BASE), got, T3) if v.task == "average"][0]
    assert v.per_seed == (3., 5.) and v.paper == pytest.approx(45.72 - 46.13)

def test_average_of_what_is_complete(three_tasks):
    "A seed or a row that one task lacks has none; the mean of one task is that task."
    lacking = (three_tasks.task == "b") & (three_tasks.method == "gif") & (three_tasks.seed == 1)
    less = add_average(three_tasks[~lacking], T3)
    seeds = less[less.task == "average"].groupby("method").seed.agg(list)
    assert seeds.to_dict() == {"baseline": [0, 1], "gif": [0]}
    assert sum(add_average(three_tasks[three_tasks.task == "a"], T3).task == "average") == 4

# misuse

@pytest.mark.parametrize("call, says", [
    (lambda r: paper_values("unidiffda/table99"), "unidiffda/table0"),
    (lambda r: table(r[:0], T2), "no records"),
    (lambda r: table(r.drop(columns="seed"), T2), "'seed'"),
    (lambda r: table(r, T2, "top-1"), "'top-1'"),
    (lambda r: table(pd.concat([r, r]), T2), "more than once"),
    (lambda r: heat_map(r, T2, "strength", "p"), "'strength'"),
    (lambda r: paper_table(T8, columns="strength"), "utilize"),
    (lambda r: assess(Claim("x", "y", {"scale": "nano"}, BASE), r), "several records")])
def test_misuse_is_one_sentence(records, call, says):
    with pytest.raises(DiffDAError) as e: call(records)
    assert says in str(e.value) and "\n" not in str(e.value)

def test_no_papers_folder(monkeypatch, tmp_path):
    monkeypatch.setattr("diffda.__file__", str(tmp_path/"site"/"diffda"/"__init__.py"))
    with pytest.raises(DiffDAError, match="install diffda again"): papers_dir()
    (tmp_path/"site"/"papers").mkdir(parents=True)
    assert papers_dir() == tmp_path/"site"/"papers"
    (tmp_path/"site"/"diffda"/"papers").mkdir(parents=True)
    assert papers_dir() == tmp_path/"site"/"diffda"/"papers"

def test_item_without_numbers(records):
    "An item that the paper gives no numbers for still has a table."
    item = "unidiffda/figure04"
    assert table(records, item).paper_mean.isna().all()
    v, = assess(Claim("x", "y", RG, BASE), records, item)
    assert math.isnan(v.paper) and v.paper_verdict == ""
    assert "no number" in dots(records, item).axes[1].texts[0].get_text()

# intervals

def exact_interval(d):
    "All n**n resamples instead of random ones."
    means = np.sort([np.mean(c) for c in itertools.product(d, repeat=len(d))])
    return tuple(np.quantile(means, [.025, .975], method="inverted_cdf"))

@pytest.mark.parametrize("d", [
    [1., 2., 3.], [-.5, 4., 4.], [3., 1.], [2., 2., 2., 9.], [-1., 0., 1., 2., 3.]])
def test_interval_against_enumeration(d):
    assert bootstrap_interval(d) == pytest.approx(exact_interval(d), abs=.2 * (max(d) - min(d)) / len(d))

def test_interval_is_the_range_for_two_and_three_seeds():
    assert bootstrap_interval([3., 1.]) == (1, 3)
    assert bootstrap_interval([5., -1., 2.]) == pytest.approx((-1, 5))
    assert all(map(math.isnan, bootstrap_interval([4.]))) and all(map(math.isnan, bootstrap_interval([])))

def test_interval_leaves_global_generators_alone():
    import torch
    state, numbers = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    assert bootstrap_interval([1., 2., 4., 5.]) == bootstrap_interval([1., 2., 4., 5.])
    assert torch.equal(state, torch.random.get_rng_state()) and (numbers == np.random.get_state()[1]).all()

@pytest.mark.parametrize("df", [1, 2, 3, 4, 9, 30, 200])
@pytest.mark.parametrize("share", [.05, .5, .9, .95, .975, .995])
def test_t_quantile_against_scipy(df, share):
    stats = pytest.importorskip("scipy.stats")
    assert t_quantile(share, df) == pytest.approx(stats.t.ppf(share, df), rel=1e-4, abs=1e-6)

def test_t_interval_against_scipy():
    stats = pytest.importorskip("scipy.stats")
    d = [.3, -.2, .8, .1]
    assert t_interval(d) == pytest.approx(stats.t.interval(.9, 3, np.mean(d), stats.sem(d)), rel=1e-4)
    assert t_interval([2., 2.]) == (2, 2) and math.isnan(t_interval([1.])[0])

# claims: a beats b

@pytest.mark.parametrize("gains, verdict", [
    ([1., 2., 3.], "holds"), ([-1., 2., 3.], "undecided"), ([0., 2., 3.], "undecided"),
    ([-1., -2., -.1], "fails"), ([0., 0., 0.], "fails"), ([0., -1., -2.], "fails"), ([5.], "undecided"),
    ([1., 2.], "holds")])
def test_verdicts(gains, verdict):
    r = frame(baseline(*[80.] * len(gains)), guidance(*(80 + g for g in gains)))
    v, = assess(Claim("x", "y", RG, BASE), r, T2)
    assert v.verdict == verdict and v.n == len(gains) and v.difference == pytest.approx(np.mean(gains))
    assert "nano scale" in str(v) and v.paper == pytest.approx(17.25) and v.paper_verdict == "holds"

def test_seeds_are_paired():
    "A large spread between seeds does not hide a gain within each; seeds of one side only do not count."
    r = frame(baseline(60., 70., 80.), guidance(61., 71.5, 81., 99.))
    v, = assess(Claim("x", "y", RG, BASE), r)
    assert (v.verdict, v.n, v.per_seed) == ("holds", 3, (1., 1.5, 1.))
    assert (v.low, v.high) == (pytest.approx(1.), pytest.approx(1.5))

def test_best_of_several(strategies):
    def side(u): return {"method": "real-guidance", "utilize": u}
    claim = Claim("fc is best", "y", side("fc"), tuple(map(side, ("fr", "lrr", "grr"))))
    v, = assess(claim, strategies, T8)
    assert (v.verdict, v.against, v.per_seed) == ("undecided", "real-guidance, grr", (-1., 1., 2.))
    assert math.isnan(v.paper)
    v, = assess(claim, strategies[strategies.utilize != "grr"], T8)
    # a rival that was not run cannot be beaten
    assert v.verdict == "undecided" and v.n == 0
    v, = assess(claim, strategies[strategies.seed == 1], T8)     # one seed: the closest rival is named
    assert (v.verdict, v.against, v.difference) == ("undecided", "real-guidance, lrr", 1.)
    v, = assess(Claim("fc beats fr", "y", side("fc"), side("fr")), strategies, T8)
    assert (v.verdict, v.low, v.high) == ("holds", 5., 5.)

def test_the_paper_contradicts_a_claim(records):
    "In its Table 2 DA-Fusion is 0.45 ahead of Real Guidance on Caltech-101 and 0.12 behind on ImageNet-100."
    r = frame(guidance(70., 71.), rows("da-fusion", "DA-Fusion", [72., 73.]))
    r = pd.concat([r, r.assign(task="other", counterpart="ImageNet-100")])
    first, second = assess(Claim("tuning", "Table 2", {"method": "da-fusion"}, RG), r, T2)
    assert (first.paper_verdict, round(first.paper, 2)) == ("holds", .45) and "contradict" not in str(first)
    assert (second.paper_verdict, round(second.paper, 2)) == ("fails", -.12)
    assert str(second).endswith("; the paper: -0.12 on ImageNet-100; the paper's own numbers contradict it")
    assert list(verdict_table([first, second])["by the paper's numbers"]) == ["holds", "fails"]

def test_the_papers_rival_may_be_another_one():
    "One rival decides here, another in the paper (Table 4, one shot: DiffuseMix is ahead of Diff-Mix)."
    r = frame(*(rows(m, m, v, counterpart="Aircraft 1-shot", task="nano-outlines-1") for m, v in
                (("diff-mix", [20., 21.]), ("real-guidance", [19., 20.]), ("diffusemix", [10., 11.]))))
    claim = Claim("tuned", "Table 4", {"method": "diff-mix"}, (RG, {"method": "diffusemix"}))
    v, = assess(claim, r, "unidiffda/table04")
    assert (v.verdict, v.against, v.paper_against) == ("holds", "real-guidance", "diffusemix")
    assert v.paper == pytest.approx(12.16 - 13.03) and "-0.87 on Aircraft 1-shot against diffusemix" in str(v)

def test_where_limits_the_tasks(records):
    two = pd.concat([records, records.assign(task="nano-digits-1", family="fine-grained")])
    def tasks(**where): return [v.task for v in assess(Claim("x", "y", RG, BASE, where=where), two)]
    assert tasks(family="conventional") == ["nano-fashion"] and len(tasks()) == 2
    assert tasks(family={"conventional", "fine-grained"}) == tasks() and tasks(nothing=1) == []

def test_beats_leaves_out_what_did_not_run():
    def names(b): return beats("gif", b, ran=["gif", "baseline"], source="s", family="f")
    assert names("mixup") is None and names(("mixup",)) is None and names("baseline").where == {"family": "f"}
    assert names(("mixup", "baseline")).text == "GIF beats the baseline"

def test_a_claim_about_another_column(records):
    r = records.assign(seconds_generate=[0.]*3 + [3600., 7200., 3600.], seconds_train=60.)
    v, = assess(Claim("it takes longer", "y", RG, BASE, value="hours_generate"), r)
    assert (v.verdict, v.per_seed) == ("holds", (1., 2., 1.))
    assert assess(Claim("x", "y", RG, BASE, value="hours_generate"), records)[0].n == 0

# claims: along a setting

def sweep(*values):
    "Real Guidance at five strengths; `values` are the curves of the seeds."
    return frame(*(guidance(*map(float, v), strength=s) for s, v in zip((.1, .3, .5, .7, .9), zip(*values))),
                 baseline(*[40.] * len(values)))

def test_slope():
    r = sweep([50, 51, 53, 54, 57], [50] * 5)
    v, = assess(Claim("grows", "y", RG, along="strength"), r, T9)
    slope = np.polyfit([.1, .3, .5, .7, .9], [50, 51, 53, 54, 57], 1)[0]
    assert v.per_seed == (pytest.approx(slope), pytest.approx(0)) and v.verdict == "undecided"
    # Caltech-101: the sum of (s - 0.5) times accuracy over the sum of (s - 0.5) squared
    assert v.paper == pytest.approx(5.734 / .4)
    v, = assess(Claim("grows", "y", RG, along="strength"), r[r.strength == .1], T9)
    assert v.n == 0 and v.verdict == "undecided"

@pytest.mark.parametrize("at, verdict, against, gains", [
    ("highest", "holds", "strength = 0.7", (3., 1.)), (.9, "holds", "strength = 0.7", (3., 1.)),
    ("lowest", "fails", "strength = 0.9", (-7., -4.)), (.7, "fails", "strength = 0.9", (-3., -1.))])
def test_best_at(at, verdict, against, gains):
    r = sweep([50, 51, 53, 54, 57], [50, 49, 52, 53, 54])
    v, = assess(BestAt("x", "y", RG, "strength", at), r, T9)
    assert (v.verdict, v.against, v.per_seed) == (verdict, against, gains)
    assert v.paper_verdict == ("holds" if at in ("highest", .9) else "fails")
    assert assess(BestAt("x", "y", {"method": "gif"}, "strength"), r)[0].n == 0

# claims: equivalence, interaction, ratio, classes, no single best

@pytest.mark.parametrize("gains, margin, verdict", [
    ([.1, .2, .3], .5, "holds"),               # 0.2 +- 0.1686
    ([.1, .2, .3], .3, "undecided"),
    ([2., 2.1, 2.2], 1., "fails"),             # equivalence is refuted: the interval is beyond the margin
    ([-1., 0., 1.], 1., "undecided"),          # three seeds that differ show nothing
    ([0., 0.], .5, "holds"), ([.1], .5, "undecided")])
def test_equivalent(gains, margin, verdict):
    r = frame(baseline(*[80.] * len(gains)), guidance(*(80 + g for g in gains)))
    v, = assess(Equivalent("x", "y", RG, BASE, margin), r, T2)
    assert v.verdict == verdict and v.paper_verdict == "fails"            # the paper's difference is 17.25
    if len(gains) > 2:
        stats = pytest.importorskip("scipy.stats")
        p = max(stats.ttest_1samp(gains, -margin, alternative="greater").pvalue,
                stats.ttest_1samp(gains, margin, alternative="less").pvalue)
        assert (p < .05) == (verdict == "holds")

def two_groups(first, second):
    "The gains of Real Guidance on two tasks, one per seed."
    def task(name, counterpart, family, gains):
        same = dict(task=name, counterpart=counterpart, family=family)
        return baseline(*[50.] * len(gains), **same) + guidance(*(50 + g for g in gains), **same)
    return frame(task("a", "CIFAR-100", "conventional", first), task("b", "ImageNet-100", "other", second))

def test_interaction():
    claim = Interaction("x", "y", RG, BASE, {"family": "conventional"}, {"family": "other"})
    v, = assess(claim, two_groups([5., 6.], [1., 3.]), T2)
    assert (v.verdict, v.per_seed, v.task) == ("holds", (4., 3.), "a and b")
    assert v.counterpart == "CIFAR-100 and ImageNet-100"
    # CIFAR-100: 66.69 - 55.22, ImageNet-100: 76.83 - 65.28
    assert v.paper == pytest.approx(11.47 - 11.55) and "contradict" in str(v)
    assert assess(claim, two_groups([5., 6.], [9., 3.]), T2)[0].verdict == "undecided"
    assert assess(claim, two_groups([5., 6.], []), T2)[0].n == 0

def test_interaction_of_groups():
    "The gain on a group is the mean over its tasks."
    more = pd.concat([two_groups([5., 6.], [1., 3.]),
                      two_groups([1., 2.], [0., 0.])[:4].assign(task="c", counterpart="Caltech-101")])
    v, = assess(Interaction("x", "y", RG, BASE, {"family": "conventional"}, {"family": "other"}), more)
    assert v.per_seed == (2., 1.)                     # (5 + 1) / 2 - 1, (6 + 2) / 2 - 3

def test_ratio():
    r = frame(baseline(1., 1.), guidance(1., 1.)).assign(seconds_train=[100., 100., 400., 900.])
    v, = assess(Ratio("x", "y", RG, BASE, at_least=4, value="hours_train"), r)
    # the root of 4 times 9
    assert (v.verdict, v.difference, v.per_seed) == ("holds", 6., pytest.approx((4., 9.)))
    assert "6.00 [4.00, 9.00] times against baseline" in str(v)
    assert assess(Ratio("x", "y", RG, BASE, at_least=5, value="hours_train"), r)[0].verdict == "undecided"
    assert assess(Ratio("x", "y", RG, BASE, at_most=3, value="hours_train"), r)[0].verdict == "fails"

def test_ratio_of_the_papers_hours():
    r = frame(rows("gif", "GIF", [1., 1.], counterpart="CIFAR-100", seconds_generate=60.),
              rows("diffusemix", "DiffuseMix", [1., 1.], counterpart="CIFAR-100", seconds_generate=90.))
    claim = Ratio("x", "y", {"method": "diffusemix"}, {"method": "gif"}, at_least=1.1, value="hours_generate")
    v, = assess(claim, r, T17)
    assert v.difference == pytest.approx(1.5) and v.paper == pytest.approx(10.53 / 9.21, abs=1e-5)
    assert v.paper_verdict == "holds"

def test_per_class():
    a, b = [.5, .6, .7, .8], [.4, .7, .6, .8]                # two gain, one loses, one is level
    r = frame(baseline(1., 1., per_class=b), guidance(1., 1., per_class=a))
    def verdict(**bounds): return assess(PerClass("x", "y", RG, BASE, **bounds), r)[0]
    assert (verdict().verdict, verdict().difference, verdict().unit) == ("holds", 50., "% of the classes")
    assert verdict(at_least=.6).verdict == "fails" and verdict(at_least=.2, at_most=.8).verdict == "holds"
    assert assess(PerClass("x", "y", BASE, RG, at_least=0., at_most=.25), r)[0].difference == 25
    assert math.isnan(verdict().paper)

def test_no_single_best():
    def part(task, **values):
        return [r for m, v in values.items() for r in rows(m, m, v, task=task, counterpart=task)]
    split = frame(part("one", gif=[72., 72.], mvc=[70., 70.]), part("two", gif=[80., 80.], mvc=[83., 82.]))
    v, = assess(NoBest("x", "y"), split)
    assert (v.verdict, v.difference, v.per_seed, v.against) == ("holds", 2., (2., 2.), "mvc everywhere")
    leader = frame(part("one", gif=[72., 72.], mvc=[70., 70.]), part("two", gif=[85., 83.5], mvc=[83., 82.]))
    v, = assess(NoBest("x", "y"), leader)
    assert (v.verdict, v.difference, v.against) == ("fails", -1.75, "gif everywhere")
    assert assess(NoBest("x", "y"), leader[leader.task == "one"])[0].n == 0

def test_no_single_best_in_the_papers_table():
    names = ["gif", "diff-mix"]
    tasks = ("Caltech-101", "CIFAR-100")
    r = frame(*(rows(m, m, [1., 2.], task=t, counterpart=t) for m in names for t in tasks))
    v, = assess(NoBest("x", "y"), r, T2)
    # 76.11 against 75.80; 68.23 against 71.37
    assert v.paper == pytest.approx(.31) and v.paper_verdict == "holds"

def test_unjudged(records):
    v, = assess(Unjudged("the finding", "Section 9", "No part makes such images."), records)
    assert str(v) == "NOT JUDGED: the finding (Section 9). No part makes such images."
    assert v.verdict == "not judged"
    assert verdict_table([v]).against[0] == "No part makes such images."

def test_verdicts_survive_json(records, tmp_path):
    claims = [Claim("x", "y", RG, BASE), None, Unjudged("z", "y", "why"),
              Ratio("r", "y", RG, BASE, value="n_synthetic")]
    verdicts = assess_all(claims, records)
    folder = save_results(T2, tmp_path, records, table(records, T2), verdicts=verdicts)
    for old, new in zip(verdicts, json.loads((folder/"claims.json").read_text()), strict=True):
        assert str(Verdict(**{k: math.nan if v is None else v for k, v in new.items()})) == str(old)

# figures and files

def test_dots_show_ours_and_the_papers(strategies):
    left, right = dots(strategies, T8).axes
    assert [t.get_text() for t in left.texts] == ["80.0", "84.0", "79.0", "82.3", "83.3"]
    assert [t.get_text() for t in left.get_yticklabels()] == list(table(strategies, T8).row)
    rings = [l for l in left.lines if l.get_marker() == "o" and len(l.get_xdata()) == 3]
    assert [list(l.get_xdata()) for l in rings][1] == [83., 84., 85.]
    assert "nano scale" in left.get_title() and "Caltech-101" in right.get_title()
    assert len(right.texts) == 9 and right.texts[1].get_text() == "76.1"                    # GIF, fc

def test_looks_differ_by_more_than_colour():
    looks = {(report.colour(m), report.marker(m)) for m in report._LOOKS}
    assert len(looks) == len(report._LOOKS) and report.marker("my-own") == report.marker("my-own")

def test_lines():
    r = frame(guidance(75., 77., strength=.9), guidance(70., 72., strength=.1), baseline(69., 70.))
    left, right = lines(r, T9).axes
    assert any(list(l.get_xdata()) == [.1, .9] and list(l.get_ydata()) == [71., 76.] for l in left.lines)
    assert any(l.get_linestyle() == "--" and set(l.get_ydata()) == {69.5} for l in left.lines)
    assert list(right.lines[0].get_ydata()) == [54.96, 56.48, 58.70, 64.31, 65.38]

def test_lines_over_other_axes():
    many = frame(*(guidance(v, num_copies=m) for m, v in ((1, 70.), (5, 72.), (20, 73.))))
    left, right = lines(many, "unidiffda/figure99", "num_copies", log=True).axes
    assert left.get_xscale() == "log" and list(left.lines[0].get_ydata()) == [70., 72., 73.]
    nets = frame(guidance(70., classifier="vit"), guidance(72., classifier="resnet50"))
    left = lines(nets, "unidiffda/figure99", "classifier").axes[0]
    assert [t.get_text() for t in left.get_xticklabels()] == ["vit", "resnet50"]

def test_a_line_per_further_axis():
    grid = frame(*(guidance(v + 10*p, strength=s, p=p) for s, v in ((.1, 70.), (.9, 72.)) for p in (.25, .5)))
    left = lines(grid, "unidiffda/figure11").axes[0]
    names = [t.get_text() for t in left.get_legend().get_texts()]
    assert names == ["Real Guidance, p=0.25", "Real Guidance, p=0.5"]

def test_heat_map(papers):
    item = papers("toy/table10", HEAD + ",fraction,num_copies",
                  *(f"gif,GIF,Caltech-101,,top1,{n}" for n in ("21.64,,.2,1", "34.96,,.2,5", "31.27,,.4,1")))
    cells = ((10., .2, 1), (20., .4, 1), (30., .2, 5))
    gif = [rows("gif", "GIF", [v], fraction=f, num_copies=n) for v, f, n in cells]
    grid = frame(*gif, baseline(5., fraction=.2))
    axes = [a for a in heat_map(grid, item, "num_copies", "fraction").axes if a.texts]
    assert [t.get_text() for t in axes[0].texts] == ["10.0", "30.0", "20.0"]
    assert [t.get_text() for t in axes[1].texts] == ["21.6", "35.0", "31.3"]

def test_figures_leave_nothing_open(records):
    import matplotlib.pyplot as plt
    before = plt.get_fignums()
    dots(records, T2)
    assert plt.get_fignums() == before

class FakePool:
    "Images whose grey value is ten times their position; the id's first character is the label."
    def __init__(self, ids, mixed=False):
        def weights(k):
            if not mixed: return [{"label": k, "weight": 1.}]
            return [{"label": k, "weight": .75}, {"label": 1 - k, "weight": .25}]
        def row(i, c):
            return dict(source_id=i, label=int(i[0]), label_weights=weights(int(i[0])), copy=c, strength=.5)
        self.rows = pd.DataFrame([row(i, c) for i in ids for c in (1, 0)])

    def image(self, i): return np.full((4, 4, 3), 10 * i, np.uint8)

class FakeSplit:
    class_names = ["cat", "dog"]
    class train:
        ids, labels = ["0a", "0b", "1a"], np.array([0, 0, 1])
        read = staticmethod(lambda i: np.full((4, 4, 3), 100 + i, np.uint8))

def test_image_grid_pairs_real_and_synthetic():
    pools = {"A": FakePool(["0b", "1a"]), "B": FakePool(["0a", "0b", "1a"], mixed=True)}
    fig = image_grid(FakeSplit, pools, copies=2)
    shown = [(int(ax.images[0].get_array().flat[0]), ax.get_xlabel()) for ax in fig.axes if ax.images]
    # class 0: the first real image that both pools have copies of is 0b, at position 1; copies in their order
    assert shown[:3] == [(101, "cat"), (10, "cat\ns=0.5"), (0, "cat\ns=0.5")]
    assert shown[3] == (30, "0.75 cat +\n0.25 dog\ns=0.5") and shown[5] == (102, "dog") and len(shown) == 10
    with pytest.raises(DiffDAError, match="same task and seed"):
        image_grid(FakeSplit, {"A": FakePool(["0z"])})

def test_image_grid_is_large_enough_and_takes_names():
    fig = image_grid(FakeSplit, {"A": FakePool(["0b", "1a"])}, classes=["dog"])
    fig.draw_without_rendering()
    first = fig.axes[0]
    assert first.get_xlabel() == "dog" and len([a for a in fig.axes if a.images]) == 3
    assert first.get_window_extent().width >= 90 and first.xaxis.label.get_size() >= 8
    with pytest.raises(DiffDAError, match="dog"):
        image_grid(FakeSplit, {"A": FakePool(["0b"])}, classes=["dgo"])

def test_save_results(records, tmp_path):
    records = records.assign(environment=[{"device": "cpu"}] * 6)
    t, v = table(records, T2), assess(Claim("x", "y", RG, BASE), records[records.seed == 0], T2)
    folder = save_results(T2, tmp_path, records, t, {"figure": dots(records, T2)}, v)
    names = ["claims.json", "figure.png", "records.jsonl", "table.csv", "table.tex"]
    assert folder == tmp_path/T2 and sorted(p.name for p in folder.iterdir()) == names
    head = (folder/"table.csv").read_text().splitlines()
    assert head[0].startswith("method,task,metric,mean,std,n,")
    assert head[2].startswith("real-guidance,nano-fashion,top1,83,1.73205,3,")
    claim, = json.loads((folder/"claims.json").read_text())
    assert claim["verdict"] == "undecided" and claim["low"] is None and claim["difference"] == 3
    found = [json.loads(l) for l in (folder/"records.jsonl").read_text().splitlines()]
    assert len(found) == 6 and found[0]["per_class"] == [.5, .6] and found[0]["best_val"] is None
    assert found[0]["environment"] == {"device": "cpu"}
    # a table can be made again from its records
    again = table(pd.DataFrame(found), T2)
    pd.testing.assert_frame_equal(again, t, check_dtype=False)
    blocked = tmp_path/"file"
    blocked.write_text("")
    with pytest.raises(DiffDAError, match="Cannot write"): save_results(T2, blocked, records, t)

def test_latex(records):
    text = report.latex(table(records.assign(share=50.), T2))
    assert r"83.00 $\pm$ 1.73" in text and r"recognised \%" in text and r"\toprule" in text
    assert "%" not in text.replace(r"\%", "") and text.count(r"\\") == 3

def test_a_caption_says_what_was_changed(monkeypatch):
    "Also a setting of nothing, and a part of the data."
    row = dict(method="baseline", title="Baseline", task="birds-1", counterpart="Birds 1-shot", scale="paper",
               seed=0, utilize="fc", equal="epochs", top1=50., n_synthetic=0)
    def caption(settings=None):
        return text_table(table(pd.DataFrame([row]), T3, settings=settings)).splitlines()[0]
    usual = {"protocol": "paper", "equal": "epochs", "safety": 0, "epochs": None}
    assert "with" not in caption() and "with" not in caption(usual)
    changed = caption({"p": 0, "scale_lr": False, "safety": 2, "protocol": "authors-code"})
    assert changed.endswith("but with p = 0, scale_lr = False, safety = 2, protocol = authors-code")
    monkeypatch.setenv("DIFFDA_PARTIAL", "1")
    assert caption().endswith("but with what there is of the data (DIFFDA_PARTIAL)")
