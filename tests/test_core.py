"Stages, files and random numbers: values worked out with hashlib, and what is left on disk when something goes wrong."
import dataclasses, errno, hashlib, threading, time
from pathlib import Path

import numpy as np, pytest, torch

from diffda import core
from diffda.core import (DiffDAError, Stage, Store, canonical, default_store, digest, disk_errors, file_digest, generator_for, lookup, make_dir, read_json,
                         resumable, seed_for, seeded, write_json, write_text, writing)

@dataclasses.dataclass(frozen=True)
class Part:
    strength: float = .5
    names: tuple = ("a", "b")

Part.__module__ = "diffda.part"                  # as if it came with the package

def sha(text): return hashlib.sha256(text.encode()).hexdigest()
def files(folder): return sorted(p.name for p in Path(folder).iterdir())

# names

def test_lookup_finds():
    assert lookup("b", {"a": 1, "b": 2}, "letter") == 2

def test_lookup_names_the_nearest():
    with pytest.raises(DiffDAError, match=r"Unknown method 'real-guidence': did you mean real-guidance\?"):
        lookup("real-guidence", {"real-guidance": 1, "cutmix": 2}, "method")

def test_lookup_lists_all_when_nothing_is_near():
    with pytest.raises(DiffDAError, match="known: cutmix, mixup"): lookup("zzzzz", {"mixup": 1, "cutmix": 2}, "method")

# digests

def test_digest_golden():
    assert digest({"b": 1, "a": [1.5, None, True]}) == sha('{"a":[1.5,null,true],"b":1}')[:16]
    assert digest("Bär", 64) == sha('"Bär"')

def test_digest_of_a_dataclass_names_its_class_and_fields():
    assert digest(Part()) == sha('{"class":"Part","names":["a","b"],"strength":0.5}')[:16]
    assert digest(Part()) != digest(Part(strength=.6))

@dataclasses.dataclass(frozen=True)
class Grown(Part):
    depth: int = core.later(3)
    kind: str = core.later("plain")

Grown.__module__, Grown.__name__ = "diffda.part", "Part"

def test_a_later_field_leaves_earlier_keys_alone():
    assert canonical(Grown()) == canonical(Part()) and digest(Grown(strength=.6)) == digest(Part(strength=.6))
    assert canonical(Grown(depth=4)) == {**canonical(Part()), "depth": 4} and len({digest(Grown(**k)) for k in ({}, {"depth": 4}, {"kind": "x"}, {"depth": 4, "kind": "x"})}) == 4
    assert Stage("train", {"part": Grown()}).key == Stage("train", {"part": Part()}).key

def written(body, value=2):
    "A part as somebody writes it in a notebook."
    space = {"dataclasses": dataclasses, "__name__": "__main__"}
    exec(f"@dataclasses.dataclass(frozen=True)\nclass Mine:\n    value: int = {value}\n    def draw(self, x):\n        {body}", space)
    return space["Mine"]()

def test_the_code_of_a_part_from_outside_belongs_to_its_digest():
    "A part that is being written is another one after each change; the same text is the same part."
    assert digest(written("return x in {'a', 'b'}")) == digest(written("return x in {'a', 'b'}")) != digest(written("return x in {'a', 'c'}"))
    assert len({digest(written(b)) for b in ("return x + 1", "return x + 2", "return x - 1", "return (lambda: x + 1)()", "return (lambda: x + 2)()")}) == 5
    assert digest(written("return 1", 2)) != digest(written("return 1", 3))

@pytest.mark.parametrize("obj", [{1, 2}, Path("/tmp"), object(), np.zeros(2), b"x", lambda: 0], ids=lambda o: type(o).__name__)
def test_no_digest_of_what_depends_on_the_machine(obj):
    with pytest.raises(TypeError): canonical({"a": [obj]})

def test_file_digest_golden(tmp_path):
    (tmp_path/"a").write_bytes(b"one"); (tmp_path/"b").write_bytes(b"two")
    whole = hashlib.sha256(hashlib.sha256(b"one").digest() + hashlib.sha256(b"two").digest()).hexdigest()
    assert file_digest(tmp_path/"a", tmp_path/"b", length=64) == whole
    assert file_digest(tmp_path/"b", tmp_path/"a", length=64) != whole

# random numbers

def test_seed_golden():
    assert seed_for(0, "cat/1", 2, "noise") == int(sha('[0, "cat/1", 2, "noise"]')[:16], 16)//2

def test_generators_depend_on_their_parts_only():
    draw = lambda *parts: torch.randn(4, generator=generator_for(*parts)).tolist()
    before = torch.get_rng_state()
    first = draw(0, "x", 1, "noise")
    torch.randn(3)
    assert draw(0, "x", 1, "noise") == first
    assert len({tuple(draw(*p)) for p in ((0, "x", 1, "noise"), (1, "x", 1, "noise"), (0, "y", 1, "noise"), (0, "x", 2, "noise"), (0, "x", 1, "crop"))}) == 5
    torch.set_rng_state(before)
    draw(0)
    assert torch.equal(torch.get_rng_state(), before)

def test_seeded_gives_the_state_back():
    before = torch.get_rng_state()
    with seeded(1, "a"): one = torch.rand(3)
    with pytest.raises(ValueError):
        with seeded(1, "a"):
            assert torch.equal(torch.rand(3), one)
            raise ValueError
    assert torch.equal(torch.get_rng_state(), before)

@pytest.mark.gpu
def test_seeded_leaves_the_gpu_alone():
    torch.rand(2, device="cuda")
    before = torch.cuda.get_rng_state()
    with seeded(1, "a"): torch.rand(3)
    assert torch.equal(torch.cuda.get_rng_state(), before)

# files

def test_writing_is_all_or_nothing(tmp_path):
    f = tmp_path/"x.json"
    write_json(f, {"a": 1})
    with pytest.raises(RuntimeError):
        with writing(f) as temp:
            temp.write_text("half")
            assert read_json(f) == {"a": 1} and temp.parent == f.parent
            raise RuntimeError
    assert read_json(f) == {"a": 1} and files(tmp_path) == ["x.json"]
    write_text(f, "ü")
    assert f.read_bytes() == "ü".encode() and files(tmp_path) == ["x.json"]

def test_file_reaches_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(core.os, "fsync", lambda fd: calls.append(("fsync", (tmp_path/"x").exists())))
    write_text(tmp_path/"x", "1")
    assert calls == [("fsync", False)] and (tmp_path/"x").exists()

@pytest.mark.parametrize("code, says", [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "read-only"), (errno.EACCES, "permission")])
def test_the_disk_refuses(tmp_path, monkeypatch, code, says):
    def refuse(fd): raise OSError(code, "no")
    write_text(tmp_path/"x", "old")
    monkeypatch.setattr(core.os, "fsync", refuse)
    with pytest.raises(DiffDAError, match=f"Cannot write .*x: .*{says}"): write_text(tmp_path/"x", "new")
    assert (tmp_path/"x").read_text() == "old" and files(tmp_path) == ["x"]

def test_other_os_errors_are_not_hidden(tmp_path):
    with pytest.raises(FileNotFoundError):
        with disk_errors(tmp_path): open(tmp_path/"none")

def test_a_file_in_the_way(tmp_path):
    (tmp_path/"f").write_text("x")
    for bad in (tmp_path/"f", tmp_path/"f"/"sub"):
        with pytest.raises(DiffDAError, match=f"Cannot write {bad}: .*file"): make_dir(bad)
        with pytest.raises(DiffDAError, match="Cannot write"): Store(bad).run(Stage("toy", {}), lambda folder: {})
    assert (tmp_path/"f").read_text() == "x"

# stages

def test_stage_key_golden():
    s = Stage("pool", Part(), ("abc",))
    assert s.key == sha('["pool",{"class":"Part","names":["a","b"],"strength":0.5},["abc"]]')[:16]
    others = [Stage("train", Part(), ("abc",)), Stage("pool", Part(.6), ("abc",)), Stage("pool", Part(), ("abd",)), Stage("pool", Part(), ("abc", "abc"))]
    assert len({s.key, *(o.key for o in others)}) == 5

def test_a_finished_stage_is_not_run_twice(tmp_path):
    store, calls = Store(tmp_path), []
    def work(folder): calls.append(folder); write_text(folder/"out", "x"); return {"images": 3}
    stage = Stage("pool", {"a": 1})
    folder = store.run(stage, work)
    assert store.run(stage, work) == folder and calls == [folder] and store.done(stage)
    assert read_json(folder/"DONE")["images"] == 3
    assert read_json(folder/"stage.json") == {"kind": "pool", "config": {"a": 1}, "inputs": []}
    store.run(Stage("pool", {"a": 2}), work)
    assert len(calls) == 2

def test_a_stage_that_fails_is_not_finished_and_keeps_what_it_has(tmp_path):
    store, stage = Store(tmp_path), Stage("pool", {"a": 1})
    def fail(folder): write_text(folder/"part", "1"); raise RuntimeError
    with pytest.raises(RuntimeError): store.run(stage, fail)
    assert not store.done(stage)
    folder = store.run(stage, lambda f: {"kept": int((f/"part").read_text())})
    assert read_json(folder/"DONE")["kept"] == 1

def test_done_is_written_last(tmp_path):
    store, stage = Store(tmp_path), Stage("pool", 1)
    seen = []
    store.run(stage, lambda f: seen.append((f/"DONE").exists()))
    assert seen == [False] and store.done(stage)

def test_two_workers_share_one_stage(tmp_path):
    calls = []
    def work(folder): calls.append(1); time.sleep(.3)
    threads = [threading.Thread(target=lambda: Store(tmp_path).run(Stage("pool", 1), work)) for _ in range(3)]
    for t in threads: t.start()
    for t in threads: t.join(30)
    assert calls == [1]

def test_default_store(monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFDA_HOME", str(tmp_path/"here"))
    assert default_store() == tmp_path/"here" and Store().root == tmp_path/"here" and not (tmp_path/"here").exists()         # until there is something to keep
    monkeypatch.delenv("DIFFDA_HOME"); monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path/"cache"))
    assert default_store() == tmp_path/"cache"/"diffda"
    monkeypatch.delenv("XDG_CACHE_HOME"); monkeypatch.setenv("HOME", str(tmp_path))
    assert default_store() == tmp_path/".cache"/"diffda"

# loops that can be interrupted

class Walk:
    "A state that depends on every step before: x <- 1.5 x + i."
    def __init__(self): self.x = torch.zeros(1, dtype=torch.float64)
    def state_dict(self): return {"x": self.x.clone()}
    def load_state_dict(self, s): self.x = s["x"].clone()
    def step(self, i): self.x = self.x*1.5 + i; return {"i": i, "x": self.x.item()}

def interrupted(walk, path, at, n=8):
    def step(i):
        if i == at: raise KeyboardInterrupt
        return walk.step(i)
    return resumable(n, step, {"walk": walk}, path, every_s=0, progress=False)

@pytest.mark.parametrize("at", [0, 1, 7])
def test_resumed_loop_equals_the_undisturbed_one(tmp_path, at):
    expected = [0.]
    for i in range(8): expected.append(expected[-1]*1.5 + i)
    path = tmp_path/"c.pt"
    with pytest.raises(KeyboardInterrupt): interrupted(Walk(), path, at)
    assert path.exists() == (at > 0)
    walk, steps = Walk(), []
    def step(i): steps.append(i); return walk.step(i)
    history = resumable(8, step, {"walk": walk}, path, every_s=0, progress=False)
    assert steps == list(range(at, 8)) and history == [{"i": i, "x": x} for i, x in enumerate(expected[1:])] and walk.x.item() == expected[-1]

def test_a_finished_loop_is_restored_without_a_step(tmp_path):
    a, b = Walk(), Walk()
    first = resumable(4, a.step, {"walk": a}, tmp_path/"c.pt", progress=False)            # the last step always saves
    assert resumable(4, lambda i: pytest.fail("ran again"), {"walk": b}, tmp_path/"c.pt", progress=False) == first
    assert a.x.item() == b.x.item() and files(tmp_path) == ["c.pt"]

def test_a_damaged_checkpoint_is_one_sentence(tmp_path):
    (tmp_path/"c.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(core.DiffDAError, match="c.pt is damaged; delete it and run again"):
        core.resumable(3, lambda i: i, {}, tmp_path/"c.pt", progress=False)

def test_a_checkpoint_from_before_there_was_a_scaler(tmp_path):
    "Training that began on a CPU has no state of a gradient scaler, and goes on where there is one."
    walk = Walk()
    resumable(2, walk.step, {"walk": walk, "scaler": torch.amp.GradScaler("cpu", enabled=False)}, tmp_path/"a.pt", progress=False)
    resumable(2, walk.step, {"walk": walk}, tmp_path/"b.pt", progress=False)
    for name in "ab":
        again, scaler = Walk(), torch.amp.GradScaler("cpu", init_scale=8.)
        assert len(resumable(3, again.step, {"walk": again, "scaler": scaler}, tmp_path/f"{name}.pt", progress=False)) == 3 and scaler.get_scale() == 8.
    with pytest.raises(DiffDAError, match="has no 'other', so another version wrote it"): resumable(3, walk.step, {"other": walk}, tmp_path/"b.pt", progress=False)

@dataclasses.dataclass(frozen=True)
class Read:
    path: str = None
    path_key: str = None

def test_where_a_file_is_does_not_count_but_what_it_holds():
    known = lambda *a: {k: v for k, v in canonical(Read(*a)).items() if k != "code"}
    assert known("/a/x", "1f") == known("/b/x", "1f") == {"class": "Read", "path_key": "1f"} and known("attributes") == {"class": "Read", "path": "attributes", "path_key": None}
