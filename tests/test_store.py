"Stages and the store: keys worked out with hashlib, work that is done once, and what is left after a fault."
import threading, time

import pytest

from diffda.core import DiffDAError, read_json, write_text
from diffda.places import store_root
from diffda.store import Stage, Store
from test_core import Part, sha

def nothing(folder, store): return {}

# keys

def test_stage_key_golden():
    stage = Stage("pool", Part(), ("abc",))
    assert stage.key == sha('["pool",{"class":"Part","names":["a","b"],"strength":0.5},["abc"]]')[:16]
    others = [Stage("train", Part(), ("abc",)), Stage("pool", Part(.6), ("abc",)),
              Stage("pool", Part(), ("abd",)),
              Stage("pool", Part(), ("abc", "abc"))]
    assert len({stage.key, *(other.key for other in others)}) == 5

def test_a_stage_stands_in_a_key_for_its_own_key():
    before = Stage("array", 1)
    assert Stage("pool", 2, (before,)).key == Stage("pool", 2, (before.key,)).key != Stage("pool", 2).key

def test_only_what_is_made_counts():
    "Who does it, in how many pieces, and what is remembered of it are not in the key."
    plain = Stage("pool", 1)
    other = Stage("pool", 1, work=nothing, together=True, shards=True, about="effort")
    assert plain.key == other.key

def test_before_is_an_order_in_which_the_work_can_be_done():
    first, alone = Stage("array", 1), Stage("array", 2)
    pool = Stage("pool", 3, (first, "digest"))
    last = Stage("train", 4, (pool, first, alone))
    assert list(last.before().values()) == [first, pool, alone, last]
    assert list(last.before()) == [stage.key for stage in (first, pool, alone, last)]

# once

def test_a_finished_stage_is_not_run_twice(tmp_path):
    store, calls = Store(tmp_path), []
    def work(folder, store):
        calls.append(folder)
        write_text(folder/"out", "x")
        return {"images": 3}
    stage = Stage("pool", {"a": 1}, work=work)
    folder = store.run(stage)
    assert store.run(stage) == folder and calls == [folder] and store.done(stage)
    assert read_json(folder/"DONE")["images"] == 3 == store.counts(stage)["images"]
    assert read_json(folder/"stage.json") == {"kind": "pool", "config": {"a": 1}, "inputs": []}
    store.run(Stage("pool", {"a": 2}, work=work))
    assert len(calls) == 2

def test_make_does_what_a_stage_builds_on_first(tmp_path):
    store, calls = Store(tmp_path), []
    def working(name): return lambda folder, store: calls.append(name)
    first = Stage("array", 1, work=working("first"))
    second = Stage("pool", 2, (first,), working("second"))
    last = Stage("train", 3, (second, first), working("last"))
    assert store.make(last) == store.dir(last) and calls == ["first", "second", "last"]
    assert store.make(last) == store.dir(last) and len(calls) == 3
    assert read_json(store.dir(last)/"stage.json")["inputs"] == [second.key, first.key]

def test_make_does_not_ask_for_inputs_of_what_is_there(tmp_path):
    "A finished stage is enough, even when what it was made of has been cleared away."
    first = Stage("array", 1, work=nothing)
    last = Stage("train", 3, (first,), nothing)
    Store(tmp_path).make(last)
    (Store(tmp_path).dir(first)/"DONE").unlink()
    Store(tmp_path).make(last)
    assert not Store(tmp_path).done(first)

def test_a_stage_that_fails_is_not_finished_and_keeps_what_it_has(tmp_path):
    store, tries = Store(tmp_path), []
    def work(folder, store):
        tries.append(1)
        if len(tries) > 1: return {"kept": int((folder/"part").read_text())}
        write_text(folder/"part", "1")
        raise RuntimeError
    stage = Stage("pool", {"a": 1}, work=work)
    with pytest.raises(RuntimeError): store.run(stage)
    assert not store.done(stage)
    folder = store.run(stage)
    assert read_json(folder/"DONE")["kept"] == 1 and read_json(folder/"DONE")["resumed"]

def test_done_is_written_last(tmp_path):
    seen = []
    stage = Stage("pool", 1, work=lambda folder, store: seen.append((folder/"DONE").exists()))
    Store(tmp_path).run(stage)
    assert seen == [False] and Store(tmp_path).done(stage)

def test_an_empty_mark_is_none(tmp_path):
    "A machine that lost its power may leave a DONE without content."
    calls = []
    stage = Stage("pool", 1, work=lambda folder, store: calls.append(1))
    folder = Store(tmp_path).run(stage)
    (folder/"DONE").write_text("")
    assert not Store(tmp_path).done(stage)
    Store(tmp_path).run(stage)
    assert len(calls) == 2 and Store(tmp_path).done(stage)

def test_what_was_half_written_is_cleared_away(tmp_path):
    stage = Stage("pool", 1, work=nothing)
    folder = Store(tmp_path).dir(stage)
    (folder/"images").mkdir(parents=True)
    (folder/"images"/".a.png.123.tmp.png").write_bytes(b"half")
    (folder/"images"/"a.png").write_bytes(b"whole")
    Store(tmp_path).run(stage)
    assert sorted(p.name for p in (folder/"images").iterdir()) == ["a.png"]

def test_a_counted_file_that_is_gone_is_named(tmp_path):
    store = Store(tmp_path)
    def work(folder, store):
        write_text(folder/"weights", "1")
        return {"files": ["weights"]}
    stage = Stage("adaptation", 1, work=work)
    store.run(stage)
    assert store.finished(stage) == store.dir(stage)
    (store.dir(stage)/"weights").unlink()
    with pytest.raises(DiffDAError, match="weights is missing. Delete the folder and run again"):
        store.finished(stage)

# several workers

def test_two_workers_share_one_stage(tmp_path):
    calls = []
    def work(folder, store):
        calls.append(1)
        time.sleep(.3)
    def run(): Store(tmp_path).run(Stage("pool", 1, work=work))
    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads: thread.start()
    for thread in threads: thread.join(30)
    assert calls == [1]

def test_shares_of_a_stage(tmp_path):
    "The share that finds all others done finishes the stage; one share is the whole."
    store, done = Store(tmp_path), []
    def work(folder, store, shard=(0, 1)):
        done.append(shard)
        return {"images": 4} if len(done) == 2 or shard[1] == 1 else None
    stage = Stage("pool", 1, work=work, shards=True)
    store.run(stage, (0, 2))
    assert not store.done(stage)
    store.run(stage, (1, 2))
    assert store.done(stage) and done == [(0, 2), (1, 2)] and store.counts(stage)["images"] == 4
    alone = Stage("pool", 2, work=work, shards=True)
    store.run(alone)
    assert store.done(alone) and done[2:] == [(0, 1)]

def test_work_that_cannot_be_shared_is_whole_in_any_share(tmp_path):
    calls = []
    stage = Stage("train", 1, work=lambda folder, store: calls.append(1))
    Store(tmp_path).run(stage, (1, 2))
    assert calls == [1] and Store(tmp_path).done(stage)

def test_the_other_processes_of_a_launch_wait(tmp_path, monkeypatch):
    "Only the first one keeps what was made; all of them work where a stage is done together."
    store, calls = Store(tmp_path), []
    def working(folder, store): calls.append(1)
    alone, together = Stage("pool", 1, work=working), Stage("adaptation", 1, work=working, together=True)
    monkeypatch.setenv("RANK", "1")
    store.run(together)
    assert calls == [1] and not store.done(together)
    def first():
        time.sleep(.3)
        store._alone(alone, store.dir(alone))
    thread = threading.Thread(target=first)
    thread.start()
    store.run(alone)
    thread.join(30)
    assert calls == [1, 1] and store.done(alone)

# places

def test_a_file_in_the_way(tmp_path):
    (tmp_path/"f").write_text("x")
    for bad in (tmp_path/"f", tmp_path/"f"/"sub"):
        with pytest.raises(DiffDAError, match="Cannot write"): Store(bad).run(Stage("toy", {}, work=nothing))
    assert (tmp_path/"f").read_text() == "x"

def test_default_store(monkeypatch, tmp_path):
    "It is made when there is something to keep."
    monkeypatch.setenv("DIFFDA_HOME", str(tmp_path/"here"))
    assert store_root() == Store().root == tmp_path/"here" and not (tmp_path/"here").exists()
    monkeypatch.delenv("DIFFDA_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path/"cache"))
    assert store_root() == tmp_path/"cache"/"diffda"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert store_root() == tmp_path/".cache"/"diffda"
