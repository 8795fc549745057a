"The strategies by counting, and labels that belong to the image they stand beside."
import dataclasses, json, math
from collections import Counter

import numpy as np, pytest, torch
from PIL import Image

from diffda.core import DiffDAError
from diffda.generate import SyntheticPool
from diffda.utilize import (STRATEGIES, RealOnly, Strategy, TwoPhase, get_strategy,
                            label_matrix, own_synthetic, pool_owners)

N, M = 40, 3
OWNERS = np.random.default_rng(0).permutation(np.repeat(np.arange(N), M))         # in no particular order
ALL, RANDOM = ["fc", "fr", "lrr", "grr", "rsp", "two-phase"], ["lrr", "grr", "rsp"]

def strategy(name, p=.5):
    "The strategy called `name`, with `p` where it has one."
    found = get_strategy(name)
    return dataclasses.replace(found, p=p) if "p" in found.fields() else found

def positions(name, owners=OWNERS, n=N, p=.5, seed=0, epoch=0, draws=0):
    return strategy(name, p).positions(owners, n, seed, epoch, draws)

def epochs(name, p, n=200, seed=0):
    return np.stack([positions(name, p=p, seed=seed, epoch=e) for e in range(n)])

def make_pool(folder, rows):
    "A pool of 2x2 images; `rows` give label weights and source ids."
    (folder/"images").mkdir(parents=True)
    lines = []
    for i, (source, pairs) in enumerate(rows):
        Image.new("RGB", (2, 2), (i, i, i)).save(folder/"images"/f"{i}.png")
        weights = [{"label": label, "weight": weight} for label, weight in pairs]
        row = {"file_name": f"images/{i}.png", "source_id": source, "label_weights": weights}
        lines.append(json.dumps(row) + "\n")
    (folder/"metadata.jsonl").write_text("".join(lines))
    return SyntheticPool(folder)

# which images

def test_all_strategies_are_known():
    "Those of the package; other tests register strategies of strangers."
    ours = [name for name in STRATEGIES.names() if STRATEGIES.owners[name] == "diffda.utilize"]
    assert sorted(ours) == sorted(ALL)

def test_real_images_only():
    assert RealOnly().positions([], N, 0, 0).tolist() == list(range(N)) and RealOnly().size(N, 7) == N

def test_full_concatenation_shows_everything_once():
    assert sorted(positions("fc")) == list(range(N + N*M))

def half_cosine(epoch, epochs): return .5 + .5*math.cos(math.pi*epoch/epochs)

def test_two_phases():
    "First all images along one cosine, then the real ones only, along a second one from a tenth of the rate."
    shown, rates = zip(*(TwoPhase().phase(epoch, 20) for epoch in range(20)))
    assert shown == (TwoPhase(),)*15 + (RealOnly(),)*5
    second = [.1*half_cosine(e, 5) for e in range(5)]
    assert list(rates) == pytest.approx([half_cosine(e, 15) for e in range(15)] + second)
    # each phase has an epoch, if there are two
    brief = TwoPhase(second_share=.01, second_rate=1.)
    assert [brief.phase(e, 2)[0] for e in (0, 1)] == [brief, RealOnly()]
    assert TwoPhase().phase(0, 1)[0] == TwoPhase()
    assert sorted(positions("two-phase")) == list(range(N + N*M))

def test_one_phase_is_all_others_have():
    for name in set(ALL) - {"two-phase"}:
        shown = [get_strategy(name).phase(e, 4) for e in range(4)]
        assert shown == [(get_strategy(name), pytest.approx(half_cosine(e, 4))) for e in range(4)]
        assert [rate for _, rate in (get_strategy(name).phase(e, 4, "constant") for e in range(4))] == [1.]*4

@pytest.mark.parametrize("name", ALL)
def test_sizes_are_those_of_the_epochs(name):
    assert strategy(name).size(N, N*M) == len(positions(name))

@pytest.mark.parametrize("name", ALL)
def test_draws_with_replacement(name):
    "As many as asked for, the same again for the same epoch, and uniform over what the strategy gives."
    got, again, other = (positions(name, epoch=e, draws=24_000) for e in (0, 0, 1))
    assert len(got) == 24_000 and (got == again).all() and (got != other).any()
    counts = np.bincount(got, minlength=N + N*M)
    share = {"fc": np.full(N + N*M, 1/(N + N*M)), "fr": np.repeat([0, 1/(N*M)], [N, N*M])}
    replaced = np.repeat([.5/N, .5/(N*M)], [N, N*M])
    want = 24_000*share.get("fc" if name == "two-phase" else name, replaced)
    live = want > 0
    chi_square = ((counts - want)[live]**2/want[live]).sum()
    assert (counts[~live] == 0).all() and chi_square < live.sum() + 5*(2*live.sum())**.5

def test_draws_of_real_images():
    got = RealOnly().positions([], N, 0, 0, draws=4000)
    assert len(got) == 4000 and set(got) == set(range(N))

def test_each_drawn_image_is_replaced_or_not_by_itself():
    "With one real image an epoch of many draws shows it and all its synthetic ones."
    got = positions("lrr", np.zeros(3, int), 1, draws=400)
    assert set(got) == {0, 1, 2, 3} and abs((got == 0).mean() - .5) < .1

def test_full_replacement_shows_synthetic_images_only():
    assert sorted(positions("fr")) == list(range(N, N + N*M))

def test_unknown_strategy():
    with pytest.raises(DiffDAError, match="Unknown utilization strategy 'grrr': did you mean"):
        get_strategy("grrr")

@pytest.mark.parametrize("p", [-.1, 1.1, "often"])
def test_p_is_a_probability(p):
    with pytest.raises(DiffDAError, match="GlobalReplacement: p"): strategy("grr", p)

def test_what_a_strategy_has_to_say_itself():
    "A base class is one sentence about what is missing, not an AttributeError."
    with pytest.raises(TypeError, match="Strategy does not say what an epoch shows"):
        Strategy().positions([], 1, 0, 0)
    with pytest.raises(TypeError, match="Strategy does not say how long an epoch is"): Strategy().size(1, 1)

@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize("p", [.1, .5, .7])
def test_share_of_replaced_images_is_p(name, p):
    got = epochs(name, p)
    assert got.shape == (200, N)
    # a binomial share
    share, sd = (got >= N).mean(), (p*(1 - p)/got.size)**.5
    assert abs(share - p) < 4*sd
    # a kept image stays in its place
    kept = got < N
    assert np.array_equal(got[kept], np.broadcast_to(np.arange(N), got.shape)[kept])

@pytest.mark.parametrize("name", RANDOM)
def test_p_zero_and_one(name):
    assert np.array_equal(epochs(name, 0., 5), np.tile(np.arange(N), (5, 1)))
    assert (epochs(name, 1., 5) >= N).all()

def test_local_replacement_uses_images_of_the_same_source():
    got = epochs("lrr", .5)
    e, place = np.nonzero(got >= N)
    assert np.array_equal(OWNERS[got[e, place] - N], place)
    counts = Counter(got[got >= N].tolist())
    assert len(counts) == N*M                                            # each of the copies has its turn
    expected = .5*200/M
    chi2 = sum((c - expected)**2/expected for c in counts.values())
    assert chi2 < N*M + 5*(2*N*M)**.5                                    # uniform among the copies

def test_global_replacement_draws_from_the_whole_pool():
    got = epochs("grr", .5)
    drawn = got[got >= N]
    e, place = np.nonzero(got >= N)
    assert abs((OWNERS[drawn - N] == place).mean() - 1/N) < .01          # its own source only by chance
    counts = np.bincount(drawn - N, minlength=N*M)
    expected = len(drawn)/(N*M)
    assert ((counts - expected)**2/expected).sum() < N*M + 5*(2*N*M)**.5

@pytest.mark.parametrize("name", RANDOM)
def test_draws_are_new_in_each_epoch_and_repeatable(name):
    a, b = epochs(name, .5, 20), epochs(name, .5, 20)
    assert np.array_equal(a, b) and len({tuple(r) for r in a}) == 20
    assert not np.array_equal(a, epochs(name, .5, 20, seed=1))

def test_draws_leave_the_global_generators_alone():
    t, n = torch.get_rng_state(), np.random.get_state()[1].copy()
    epochs("grr", .5, 2)
    epochs("lrr", .5, 2)
    assert torch.equal(t, torch.get_rng_state()) and np.array_equal(n, np.random.get_state()[1])

def test_local_replacement_with_unequal_numbers_of_copies():
    owners = [2, 0, 1, 2, 2]
    assert own_synthetic(owners, 3, np.array([0., .5, .999])).tolist() == [3 + 1, 3 + 2, 3 + 4]
    assert own_synthetic(owners, 3, np.array([.9, .9, 0.])).tolist() == [3 + 1, 3 + 2, 3 + 0]

def test_local_replacement_of_an_image_without_copies():
    "A filter may have dropped all of them: the real image stays."
    owners = [0, 0, 2]
    assert own_synthetic(owners, 4, np.full(4, .9)).tolist() == [4 + 1, 1, 4 + 2, 3]
    assert positions("lrr", owners, 4, p=1.)[[1, 3]].tolist() == [1, 3]
    assert positions("lrr", [], 0, p=1.).tolist() == []

# labels

def test_pool_owners(tmp_path):
    pool = make_pool(tmp_path/"p", [("b", [(1, 1.)]), ("a", [(0, 1.)]), ("b", [(1, 1.)])])
    assert pool_owners(pool, ["a", "b", "c"]).tolist() == [1, 0, 1]

def test_a_pool_of_another_split_is_refused(tmp_path):
    pool = make_pool(tmp_path/"p", [("b", [(1, 1.)]), ("x", [(0, 1.)]), ("y", [(0, 1.)])])
    with pytest.raises(DiffDAError, match="holds 2 images made from images outside this split, first 'x'"):
        pool_owners(pool, ["a", "b"])

def test_an_empty_pool_is_refused(tmp_path):
    (tmp_path/"metadata.jsonl").write_text("")
    with pytest.raises(DiffDAError, match="is empty; a method that adds nothing"):
        pool_owners(SyntheticPool(tmp_path), ["a"])

def test_labels_are_weights_of_the_pools_own_rows(tmp_path):
    pool = make_pool(tmp_path/"p", [("b", [(1, .75), (2, .25)]), ("a", [(0, 1.)])])
    assert label_matrix([0, 2], 3, pool).tolist() == [[1, 0, 0], [0, 0, 1], [0, .75, .25], [1, 0, 0]]
    assert label_matrix([0, 2], 3).tolist() == [[1, 0, 0], [0, 0, 1]]
    assert label_matrix([0], 3, pool).dtype == np.float32

def test_source_equal_to_target_adds_up_to_one(tmp_path):
    pool = make_pool(tmp_path/"p", [("a", [(1, .3), (1, .7)])])
    assert np.allclose(pool.weights(2), [[0, 1]])

@pytest.mark.parametrize("pairs", [[(0, .5)], [(0, .8), (1, .8)], []])
def test_weights_that_do_not_sum_to_one_are_refused(tmp_path, pairs):
    pool = make_pool(tmp_path/"p", [("a", pairs)])
    with pytest.raises(DiffDAError, match="do not sum to one"): pool.weights(2)

@pytest.mark.parametrize("label", [2, -1])
def test_a_label_the_task_does_not_have_is_refused(tmp_path, label):
    pool = make_pool(tmp_path/"p", [("a", [(label, 1.)])])
    with pytest.raises(DiffDAError, match=f"Label {label} in .* is none of this task's 2 classes"):
        pool.weights(2)

def test_global_replacement_brings_the_synthetic_images_own_label(tmp_path):
    "Position j >= n_real of an epoch has row j of the label matrix, whichever real image it replaces."
    rng = np.random.default_rng(1)
    real, ids = rng.integers(0, 4, N), [f"id{i}" for i in range(N)]
    soft = [(ids[o], [(int(real[o]), .9), (int(real[o] + 1)%4, .1)]) for o in OWNERS]
    pool = make_pool(tmp_path/"p", soft)
    labels, owners = label_matrix(real, 4, pool), pool_owners(pool, ids)
    assert np.array_equal(owners, OWNERS)
    got = positions("grr", owners, p=1.)
    assert np.array_equal(labels[got].argmax(1), real[OWNERS[got - N]])
    # so the replaced image's label would have been wrong
    assert (labels[got].argmax(1) != real).any()
