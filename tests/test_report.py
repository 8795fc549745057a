"Tables, figures and verdicts: values worked out by hand or by another way of computing."
import itertools, json, math

import numpy as np, pandas as pd, pytest

from diffda import report
from diffda.core import DiffDAError
from diffda.report import Claim, add_average, bars, bootstrap_interval, image_grid, judge, lines, paper_table, paper_values, papers_dir, save_results, show, table, text_table

T2, T8, T9 = (f"unidiffda/table{n}" for n in ("02", "08", "09"))

def rows(method, title, top1, **settings):
    "Made-up records, one per seed."
    base = dict(method=method, title=title, task="nano-fashion", counterpart="Caltech-101", scale="nano", family="conventional", utilize="fc", p=float("nan"),
                strength=.9, num_copies=5, equal="epochs", n_synthetic=1250, per_class=[.5, .6], best_val=float("nan"))
    if method == "baseline": base.update(utilize="none", strength=float("nan"), num_copies=0, n_synthetic=0)
    return [{**base, **settings, "seed": s, "top1": v} for s, v in enumerate(top1)]

BASE = {"method": "baseline", "equal": "epochs"}
RG = {"method": "real-guidance"}

@pytest.fixture
def records(): return pd.DataFrame(rows("baseline", "Baseline", [79., 80., 81.5]) + rows("real-guidance", "Real Guidance", [82., 82., 85.]))

@pytest.fixture
def strategies():
    r = rows("baseline", "Baseline", [79., 80., 81.])
    for u, v in (("fc", [83., 84., 85.]), ("fr", [78., 79., 80.]), ("lrr", [82., 83., 82.]), ("grr", [84., 83., 83.])):
        r += rows("real-guidance", "Real Guidance", v, utilize=u, p=.5 if u.endswith("rr") else float("nan"))
    return pd.DataFrame(r)

# tables

def test_table_golden(records):
    t = table(records, T2)
    assert list(t.columns) == ["method", "task", "metric", "mean", "std", "n", "row", "scale", "counterpart", "paper_mean", "paper_std"]
    b, r = t.to_dict("records")
    assert (b["mean"], r["mean"]) == (pytest.approx(240.5 / 3), 83.0)
    assert b["std"] == pytest.approx(math.sqrt(((79 - 240.5 / 3) ** 2 + (80 - 240.5 / 3) ** 2 + (81.5 - 240.5 / 3) ** 2) / 2))
    assert r["std"] == pytest.approx(math.sqrt(3)) and (b["n"], r["n"]) == (3, 3)
    assert (r["paper_mean"], r["paper_std"]) == (67.20, 1.57) and (b["paper_mean"], b["paper_std"]) == (49.95, 3.94)

def test_one_seed_has_no_std(records):
    t = table(records[records.seed == 1], T2)
    assert t["std"].isna().all() and set(t.n) == {1} and "1 seed" in text_table(t) and "±" not in text_table(t).splitlines()[0]

def test_equal_steps_row(records):
    both = pd.concat([records, pd.DataFrame(rows("baseline", "Baseline", [80., 81., 82.], equal="steps"))])
    t = table(both, T2).set_index("row")
    assert t.loc["Baseline (equal steps)", "mean"] == 81 and math.isnan(t.loc["Baseline (equal steps)", "paper_mean"])
    assert t.loc["Baseline", "paper_mean"] == 49.95
    alone = table(both[both.equal == "steps"], T2)
    assert alone.paper_mean.isna().all()             # the paper has no such run, also where nothing else is in the table

def test_table8_axis_is_utilize_only(strategies):
    t = table(strategies, T8)
    assert list(t.columns[6:8]) == ["utilize", "row"]        # p goes with the strategy and tells no rows apart
    assert list(t.row) == ["Baseline", *(f"Real Guidance, {u}" for u in ("fc", "fr", "lrr", "grr"))]
    assert t.paper_mean.tolist()[0] == 49.95 and t.paper_mean[1:].isna().all()      # Real Guidance is not in the paper's Table 8
    gif = strategies.assign(method=strategies.method.replace("real-guidance", "gif"))
    assert table(gif, T8).paper_mean.tolist() == [49.95, 76.11, 51.43, 56.37, 55.62]

def test_extra_axis_is_found(records):
    more = pd.concat([records, pd.DataFrame(rows("real-guidance", "Real Guidance", [83., 83., 83.], num_copies=10))])
    assert set(table(more, T2).row) == {"Baseline", "Real Guidance, 5 copies", "Real Guidance, 10 copies"}

def test_other_metrics(records):
    t = table(records.assign(best_test=records.top1 + 1, top5=99.), T2, "best_test").set_index("method")
    assert t.loc["real-guidance", "mean"] == 84 and t.loc["real-guidance", "paper_mean"] == 67.20
    assert table(records.assign(top5=99.), T2, "top5").paper_mean.isna().all()
    nothing = table(records, T2, "best_val")                          # a task without validation images
    assert set(nothing.n) == {0} and "–" in text_table(nothing)

def test_wide_text_names_the_scale(records):
    two = pd.concat([records, records.assign(task="nano-fashion-100", counterpart="CIFAR-100")])
    text = text_table(table(two, T2))
    for part in ("nano scale", "nano-fashion-100", "paper: CIFAR-100", "83.00 ± 1.73", "66.69 ± 0.53", "3 seeds"): assert part in text
    html = show(table(two, T2)).to_html()
    assert "nano scale" in html and "66.69" in html
    show(table(pd.concat([records, records.assign(task="other")]), T2)).to_html()       # two tasks beside the same dataset

def test_text_from_a_csv_file(records, tmp_path):
    folder = save_results(T2, tmp_path, records, table(records, T2))
    assert "83.00 ± 1.73" in text_table(pd.read_csv(folder/"table.csv"))
    bare = pd.DataFrame([dict(method="baseline", task="t", metric="top1", mean=1., std=float("nan"), n=1, counterpart="C", paper_mean=2., paper_std=float("nan"))])
    assert "2.00" in text_table(bare)

def test_paper_table():
    assert paper_table(T2).loc["Real Guidance", "Caltech-101"] == "67.20 ± 1.57" and paper_table(T2).index[0] == "Baseline"
    assert paper_table(T8).loc["GIF, lrr", "Birds 1-shot"] == "–" and paper_table(T8).loc["GIF, lrr", "Birds (full)"] == "42.06"

# the share of recognised images, and the average over tasks

def test_share_stands_beside_the_accuracy(records, tmp_path):
    seen = records.assign(share=[None]*3 + [90., 80., 85.])
    t = table(seen, T2)
    assert t.columns[-1] == "share" and math.isnan(t.share[0]) and t.share[1] == pytest.approx(85)
    text = text_table(t)
    assert "recognised %" in text.splitlines()[1] and " 85.0 " in text and "reference classifier" in text.splitlines()[0]
    assert "recognised" in show(t).to_html()
    again = pd.read_csv(save_results(T2, tmp_path, seen, t)/"table.csv")
    assert again.share[1] == 85 and "85.0" in text_table(again)
    for none in (records, records.assign(share=None), records.assign(share=float("nan"))):
        assert "share" not in table(none, T2) and "recognised" not in text_table(table(none, T2))

def test_share_of_one_task_only(records):
    "A task without a reference has no such column, the others keep theirs."
    two = pd.concat([records.assign(share=50.), records.assign(task="other", counterpart="CIFAR-100", share=float("nan"))])
    assert list(report.wide(table(two, T2)).columns) == ["nano-fashion (nano scale)", "recognised %", "paper: Caltech-101", "other (nano scale)", "paper: CIFAR-100"]

def test_many_tasks_come_below_each_other(records):
    t = table(pd.concat([records.assign(task=f"task-{i}") for i in range(5)]), T2)
    lines = text_table(t).splitlines()
    assert sum(l.startswith("Baseline") for l in lines) == 3 and all(f"task-{i}" in "\n".join(lines) for i in range(5)) and max(map(len, lines[1:])) < 120

def test_item_without_numbers_has_no_column_for_them(records):
    assert list(report.wide(table(records, "unidiffda/figure04")).columns) == ["nano-fashion (nano scale)"]

def test_average():
    "By hand: the mean over three tasks, per seed; a seed or a row that one task lacks has none."
    r = [x for t, up in (("a", 0.), ("b", 10.), ("c", 20.)) for m, title, v in (("baseline", "Baseline", [40., 50.]), ("gif", "GIF", [43., 55.]))
         for x in rows(m, title, [v[0] + up, v[1] + 2*up], task=t, counterpart=f"Birds {t}", p=.1 if t == "a" else .5, share=80. + up, n_real=5)]
    full = pd.DataFrame(r)
    got = add_average(full, "unidiffda/table03", "Birds average")
    assert got[:len(full)].top1.tolist() == full.top1.tolist() and list(got.columns) == list(full.columns)
    mean = got[got.task == "average"]
    assert mean.set_index(["method", "seed"]).top1.to_dict() == {("baseline", 0): 50., ("baseline", 1): 70., ("gif", 0): 53., ("gif", 1): 75.}
    assert set(mean.share) == {90.} and set(mean.counterpart) == {"Birds average"} and set(mean.family) == {"conventional"} and set(mean.n_real) == {15} and set(mean.seed) == {0, 1}
    assert mean.p.isna().all() and mean.best_val.isna().all()                    # what differs between tasks, or is missing on one, is left out
    t = table(got, "unidiffda/table03")
    assert not {"p", "strength"} & set(t.columns) and t[t.task == "average"].set_index("method").paper_mean.to_dict() == {"baseline": 46.13, "gif": 45.72}
    v = [v for v in judge(Claim("x", "y", {"method": "gif"}, BASE), got, "unidiffda/table03") if v.task == "average"][0]
    assert v.per_seed == (3., 5.) and v.paper == pytest.approx(45.72 - 46.13)
    less = add_average(full[~((full.task == "b") & (full.method == "gif") & (full.seed == 1))], "unidiffda/table03")
    assert less[less.task == "average"].groupby("method").seed.agg(list).to_dict() == {"baseline": [0, 1], "gif": [0]}
    assert sum(add_average(full[full.task == "a"], "unidiffda/table03").task == "average") == 4     # the mean of one task is that task

# misuse

@pytest.mark.parametrize("call, says", [
    (lambda r: paper_values("unidiffda/table99"), "unidiffda/table0"),
    (lambda r: report.paper_notebook("unidifda/table02"), "unidiffda/table02"),
    (lambda r: table(r[:0], T2), "no records"),
    (lambda r: table(r.drop(columns="seed"), T2), "'seed'"),
    (lambda r: table(r, T2, "top-1"), "'top-1'"),
    (lambda r: table(pd.concat([r, r]), T2), "more than once"),
    (lambda r: judge(Claim("x", "y", {"scale": "nano"}, BASE), r), "several records")])
def test_misuse_is_one_sentence(records, call, says):
    with pytest.raises(DiffDAError) as e: call(records)
    assert says in str(e.value) and "\n" not in str(e.value)

def test_no_papers_folder(monkeypatch, tmp_path):
    monkeypatch.setattr("diffda.__file__", str(tmp_path/"site"/"diffda"/"__init__.py"))
    with pytest.raises(DiffDAError, match="install diffda again"): papers_dir()
    (tmp_path/"site"/"papers").mkdir(parents=True); assert papers_dir() == tmp_path/"site"/"papers"
    (tmp_path/"site"/"diffda"/"papers").mkdir(parents=True); assert papers_dir() == tmp_path/"site"/"diffda"/"papers"

def test_item_without_numbers(records):
    "An item that the paper gives no numbers for still has a table."
    t = table(records, "unidiffda/figure04")
    assert t.paper_mean.isna().all() and not judge(Claim("x", "y", RG, BASE), records, "unidiffda/figure04")[0].paper > 0
    assert "no number" in bars(records, "unidiffda/figure04").axes[1].texts[0].get_text()

# claims

def exact_interval(d):
    "All n**n resamples instead of random ones."
    means = np.sort([np.mean(c) for c in itertools.product(d, repeat=len(d))])
    return tuple(np.quantile(means, [.025, .975], method="inverted_cdf"))

@pytest.mark.parametrize("d", [[1., 2., 3.], [-.5, 4., 4.], [3., 1.], [2., 2., 2., 9.], [-1., 0., 1., 2., 3.]])
def test_interval_against_enumeration(d):
    assert bootstrap_interval(d) == pytest.approx(exact_interval(d), abs=.2 * (max(d) - min(d)) / len(d))

def test_interval_is_the_range_for_two_and_three_seeds():
    assert bootstrap_interval([3., 1.]) == (1, 3) and bootstrap_interval([5., -1., 2.]) == pytest.approx((-1, 5))
    assert all(map(math.isnan, bootstrap_interval([4.]))) and all(map(math.isnan, bootstrap_interval([])))

def test_interval_leaves_global_generators_alone():
    import torch
    state, numbers = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    assert bootstrap_interval([1., 2., 4., 5.]) == bootstrap_interval([1., 2., 4., 5.])
    assert torch.equal(state, torch.random.get_rng_state()) and (numbers == np.random.get_state()[1]).all()

@pytest.mark.parametrize("gains, verdict", [([1., 2., 3.], "holds"), ([-1., 2., 3.], "undecided"), ([0., 2., 3.], "undecided"), ([-1., -2., -.1], "fails"),
                                            ([0., 0., 0.], "fails"), ([0., -1., -2.], "fails"), ([5.], "undecided"), ([1., 2.], "holds")])
def test_verdicts(gains, verdict):
    r = pd.DataFrame(rows("baseline", "Baseline", [80.] * len(gains)) + rows("real-guidance", "Real Guidance", [80 + g for g in gains]))
    v, = judge(Claim("x", "y", RG, BASE), r, T2)
    assert v.verdict == verdict and v.n == len(gains) and v.difference == pytest.approx(np.mean(gains))
    assert "nano scale" in str(v) and v.paper == pytest.approx(17.25)

def test_seeds_are_paired():
    "A large spread between seeds does not hide a gain within each; seeds that only one side has do not count."
    r = pd.DataFrame(rows("baseline", "Baseline", [60., 70., 80.]) + rows("real-guidance", "Real Guidance", [61., 71.5, 81., 99.]))
    v, = judge(Claim("x", "y", RG, BASE), r)
    assert (v.verdict, v.n, v.per_seed, v.low, v.high) == ("holds", 3, (1., 1.5, 1.), pytest.approx(1.), pytest.approx(1.5))

def test_best_of_several(strategies):
    side = lambda u: {"method": "real-guidance", "utilize": u}
    claim = Claim("fc is best", "y", side("fc"), tuple(map(side, ("fr", "lrr", "grr"))))
    v, = judge(claim, strategies, T8)
    assert (v.verdict, v.against, v.per_seed) == ("undecided", "real-guidance, grr", (-1., 1., 2.)) and math.isnan(v.paper)
    v, = judge(claim, strategies[strategies.utilize != "grr"], T8)
    assert v.verdict == "undecided" and v.n == 0                       # a rival that was not run cannot be beaten
    v, = judge(claim, strategies[strategies.seed == 1], T8)             # one seed: undecided, but the closest rival is named
    assert (v.verdict, v.against, v.difference) == ("undecided", "real-guidance, lrr", 1.)
    v, = judge(Claim("fc beats fr", "y", side("fc"), side("fr")), strategies, T8)
    assert (v.verdict, v.low, v.high) == ("holds", 5., 5.)

def test_slope():
    s = [.1, .3, .5, .7, .9]
    r = pd.DataFrame([x for st, v in zip(s, zip([50, 51, 53, 54, 57], [50, 50, 50, 50, 50])) for x in rows("real-guidance", "Real Guidance", map(float, v), strength=st)]
                     + rows("baseline", "Baseline", [40., 40.]))
    v, = judge(Claim("grows", "y", RG, along="strength"), r, T9)
    assert v.per_seed == (pytest.approx(np.polyfit(s, [50, 51, 53, 54, 57], 1)[0]), pytest.approx(0)) and v.verdict == "undecided"
    assert v.paper == pytest.approx(5.734 / .4)                         # Caltech-101: sum of (s - .5) * accuracy over sum of (s - .5)**2
    v, = judge(Claim("grows", "y", RG, along="strength"), r[r.strength == .1], T9)
    assert v.n == 0 and v.verdict == "undecided"

def test_where_limits_the_tasks(records):
    two = pd.concat([records, records.assign(task="nano-digits-1", family="fine-grained")])
    assert [v.task for v in judge(Claim("x", "y", RG, BASE, where={"family": "conventional"}), two)] == ["nano-fashion"]
    assert len(judge(Claim("x", "y", RG, BASE), two)) == 2

# figures and files

def test_bars_show_ours_and_the_papers(strategies):
    left, right = bars(strategies, T8).axes
    assert [p.get_x() + p.get_width() for p in left.patches] == [80., 84., 79., pytest.approx(247 / 3), pytest.approx(250 / 3)]
    assert len(left.lines[-1].get_xdata()) == len(strategies) or any(len(l.get_xdata()) == len(strategies) for l in left.lines)
    assert "nano scale" in left.get_title() and "Caltech-101" in right.get_title()
    assert len(right.patches) == 9 and right.patches[1].get_x() + right.patches[1].get_width() == pytest.approx(76.11)      # GIF, fc

def test_lines():
    r = pd.DataFrame([x for s, v in ((.9, 75.), (.1, 70.)) for x in rows("real-guidance", "Real Guidance", [v, v + 2], strength=s)] + rows("baseline", "Baseline", [69., 70.]))
    left, right = lines(r, T9).axes
    assert any(list(l.get_xdata()) == [.1, .9] and list(l.get_ydata()) == [71., 76.] for l in left.lines)
    assert any(l.get_linestyle() == "--" and set(l.get_ydata()) == {69.5} for l in left.lines)
    assert list(right.lines[0].get_ydata()) == [54.96, 56.48, 58.70, 64.31, 65.38]

def test_figures_leave_nothing_open(records):
    import matplotlib.pyplot as plt
    before = plt.get_fignums()
    bars(records, T2)
    assert plt.get_fignums() == before

class FakePool:
    def __init__(self, ids, mixed=False):
        weights = lambda k: [{"label": k, "weight": .75}, {"label": 1 - k, "weight": .25}] if mixed else [{"label": k, "weight": 1.}]
        self.rows = pd.DataFrame([dict(source_id=i, label=int(i[0]), label_weights=weights(int(i[0])), copy=c, strength=.5) for i in ids for c in (1, 0)])
    def image(self, i): return np.full((4, 4, 3), 10 * i, np.uint8)

class FakeSplit:
    class_names = ["cat", "dog"]
    class train:
        ids, labels = ["0a", "0b", "1a"], np.array([0, 0, 1])
        read = staticmethod(lambda i: np.full((4, 4, 3), 100 + i, np.uint8))

def test_image_grid_pairs_real_and_synthetic():
    fig = image_grid(FakeSplit, {"A": FakePool(["0b", "1a"]), "B": FakePool(["0a", "0b", "1a"], mixed=True)}, copies=2)
    shown = [(int(ax.images[0].get_array().flat[0]), ax.get_xlabel()) for ax in fig.axes if ax.images]
    # class 0: the first real image that both pools have copies of is 0b, at position 1; copies in the order of their number
    assert shown[:3] == [(101, "cat"), (10, "cat\ns=0.5"), (0, "cat\ns=0.5")]
    assert shown[3] == (30, "0.75 cat +\n0.25 dog\ns=0.5") and shown[5] == (102, "dog") and len(shown) == 10
    with pytest.raises(DiffDAError, match="same task and seed"): image_grid(FakeSplit, {"A": FakePool(["0z"])})

def test_save_results(records, tmp_path):
    t, v = table(records, T2), judge(Claim("x", "y", RG, BASE), records[records.seed == 0], T2)
    folder = save_results(T2, tmp_path, records, t, {"figure": bars(records, T2)}, v)
    assert folder == tmp_path/T2 and sorted(p.name for p in folder.iterdir()) == ["claims.json", "figure.png", "records.jsonl", "table.csv"]
    head = (folder/"table.csv").read_text().splitlines()
    assert head[0].startswith("method,task,metric,mean,std,n,") and head[2].startswith("real-guidance,nano-fashion,top1,83,1.73205,3,")
    claim, = json.loads((folder/"claims.json").read_text())
    assert claim["verdict"] == "undecided" and claim["low"] is None and claim["difference"] == 3
    lines = [json.loads(l) for l in (folder/"records.jsonl").read_text().splitlines()]
    assert len(lines) == 6 and lines[0]["per_class"] == [.5, .6] and lines[0]["best_val"] is None
    again = table(pd.DataFrame(lines), T2)                         # a table can be made again from its records
    pd.testing.assert_frame_equal(again, t, check_dtype=False)
    blocked = tmp_path/"file"; blocked.write_text("")
    with pytest.raises(DiffDAError, match="Cannot write"): save_results(T2, blocked, records, t)


def test_a_caption_says_what_was_changed(monkeypatch):
    "Also a setting of nothing, and a part of the data."
    frame = pd.DataFrame([dict(method="baseline", title="Baseline", task="birds-1", counterpart="Birds 1-shot", scale="paper", seed=0, utilize="fc", equal="epochs", top1=50., n_synthetic=0)])
    caption = lambda settings=None: text_table(table(frame, "unidiffda/table03", settings=settings)).splitlines()[0]
    assert "with" not in caption() and "with" not in caption({"protocol": "paper", "equal": "epochs", "safety": 0, "epochs": None})
    assert caption({"p": 0, "scale_lr": False, "safety": 2, "protocol": "authors-code"}).endswith("but with p = 0, scale_lr = False, safety = 2, protocol = authors-code")
    monkeypatch.setenv("DIFFDA_PARTIAL", "1")
    assert caption().endswith("but with what there is of the data (DIFFDA_PARTIAL)")
