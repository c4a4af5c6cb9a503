"""Rows to files and back, over real services in this process: any number of servers, other numbers, lost slots."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hashring.planner import CreateTable, DropTable, Fail, Join, Place, Return, plan
from hashring.view import Server, View
from ps.checkpoint.files import checkpoints
from ps.checkpoint.job import work
from ps.checkpoint.models import newest_versions
from ps.checkpoint.reach import Access
from ps.checkpoint.restore import Restored, restore
from ps.checkpoint.save import Saved, save
from ps.checkpoint.storage import CheckpointError, Storage
from ps.client import Client, connect
from ps.config import Config
from ps.controller.restore import Restore, prepare, told
from ps.errors import RequestError, SlotsLost
from ps.loop import LoopThread
from ps.service import Service, serve
from ps.spec import SGD, Adagrad, TableSpec
from ps.store import Store

TOKEN = "secret"
CONFIG = Config().with_settings("cluster", slot_bits=6)
ITEM = TableSpec("item", dim=4, optimizer=Adagrad(lr=0.1), seed=5)
USER = TableSpec("user", dim=8, optimizer=SGD(lr=1.0), seed=6)
WHOLE = TableSpec("whole", dim=4, optimizer=Adagrad(lr=0.1), placement="whole")
IDS = np.arange(-700, 700, dtype=np.int64)


class Cluster:
    """Services on data threads of their own, and a stand-in for the controller."""

    def __init__(self, folder: Path, servers: int, cluster: int) -> None:
        self.folder = folder
        folder.mkdir()
        self.threads: list[LoopThread] = []
        self.services: dict[int, tuple[LoopThread, Service]] = {}
        self.view = View.empty(cluster, 6)
        self.final: View | None = None
        self.install(plan(self.view, Join(tuple(self.launch(f"s{i}") for i in range(servers)))))

    def launch(self, name: str) -> Server:
        thread = LoopThread(f"data-{name}")
        self.threads.append(thread)
        incarnation = len(self.threads) + self.view.cluster * 1000

        async def begin() -> list[str]:
            async def control(verb: str, fields: dict[str, Any]) -> dict[str, Any]:
                return await asyncio.to_thread(self.ask, verb, **fields)

            service = Service(Store(incarnation), CONFIG, TOKEN, control, name)
            self.services[incarnation] = (thread, service)
            return await serve(service, [f"unix:{self.folder}/{incarnation}"])

        return Server(name, incarnation, "h", "", tuple(thread.call(begin(), 60)))

    def install(self, view: View) -> None:
        async def take(service: Service) -> None:
            service.install(view)

        self.view = view
        for server in view.servers:
            if server.alive and server.incarnation in self.services:
                thread, service = self.services[server.incarnation]
                thread.call(take(service), 60)

    def change(self, change: Any) -> None:
        self.install(plan(self.view, change))

    def create(self, *specs: TableSpec) -> None:
        for spec in specs:
            self.change(CreateTable(spec.name, spec.to_plain(), spec.placement, spec.replicas))

    def kill(self, name: str) -> None:
        """The process dies and comes back as another."""
        self.change(Fail(name))
        self.change(Return(self.launch(name)))

    def ask(self, verb: str, **fields: Any) -> dict[str, Any]:
        if verb == "status":
            return {"cluster": self.view.cluster, "fingerprint": CONFIG.fingerprint}
        if verb == "restored":
            assert self.final is not None
            self.install(self.final)
            return {}
        done: Restore = prepare(self.view, fields.pop("manifest"), **fields)
        self.install(done.first)
        self.final = done.final
        return {**told(done), "restore": 1}

    def client(self) -> Client:
        living = [s.addresses[0] for s in self.view.servers if s.alive]
        return connect(",".join(living), token=TOKEN, timeout=60.0)

    def save(self, folder: Path | str, name: str | None = None, **options: Any) -> Saved:
        servers = self.view.servers
        return save(Storage(folder), servers, Access(TOKEN), CONFIG.fingerprint, name=name, **options)

    def restore(self, folder: Path | str, **options: Any) -> Restored:
        return restore(Storage(folder), self.ask, Access(TOKEN), **options)

    def close(self) -> None:
        async def end(service: Service) -> None:
            await service.end()

        for thread, service in self.services.values():
            thread.call(end(service), 60)
        for thread in self.threads:
            thread.close()


@pytest.fixture
def clusters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    made: list[Cluster] = []
    root = tmp_path_factory.mktemp("c")

    def make(servers: int, cluster: int) -> Cluster:
        made.append(Cluster(root / str(cluster), servers, cluster))
        return made[-1]

    yield make
    for cluster in made:
        cluster.close()


def train(cluster: Cluster) -> None:
    rng = np.random.default_rng(1)
    with cluster.client() as client:
        for spec in (ITEM, USER, WHOLE):
            client.push(spec.name, IDS, rng.normal(size=(len(IDS), spec.dim)).astype(np.float32))
            client.push(spec.name, IDS[::3], rng.normal(size=(len(IDS[::3]), spec.dim)).astype(np.float32))
        client.delete("item", IDS[:50])


def rows(cluster: Cluster) -> dict[str, np.ndarray]:
    with cluster.client() as client:
        return {spec.name: client.pull(spec.name, IDS, absent="zeros") for spec in (ITEM, USER, WHOLE)}


def assert_equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def test_onto_any_number_of_servers_under_other_numbers(clusters, tmp_path):
    source = clusters(3, cluster=1)
    source.create(ITEM, USER, WHOLE)
    train(source)
    saved = source.save(tmp_path, "one")
    assert (saved.rows, saved.slots, saved.tables) == (3 * len(IDS) - 50, 65, 3)
    assert [m.rows for m in checkpoints(Storage(tmp_path))] == [saved.rows]

    target = clusters(2, cluster=2)
    target.create(replace(USER, name="gone"), replace(WHOLE, name="gone-too"))
    target.change(DropTable("gone"))
    target.change(DropTable("gone-too"))
    moved = target.restore(tmp_path)
    assert (moved.rows, moved.slots, moved.tables) == (saved.rows, 65, 3)
    assert_equal(rows(target), rows(source))
    assert target.view.table("item").number != source.view.table("item").number
    assert not target.view.lost().any()
    for cluster in (source, target):  # the state came with the rows: equal pushes go on equally
        with cluster.client() as client:
            client.push("item", IDS, np.full((len(IDS), 4), 0.25, np.float32))
    assert_equal(rows(target), rows(source))
    again = target.save(tmp_path, "two")
    assert again.rows >= saved.rows


def test_terms_rise_above_the_checkpoints_and_pushes_are_remembered(clusters, tmp_path):
    source = clusters(1, cluster=3)
    source.create(ITEM)
    for number in range(12):
        source.create(TableSpec(f"t{number}", dim=4))
    with source.client() as client:
        client.push("item", IDS, np.ones((len(IDS), 4), np.float32))
    source.save(tmp_path, "one")
    before = stand(source)
    target = clusters(2, cluster=4)
    target.restore(tmp_path)
    assert target.view.epoch > source.view.epoch
    after = stand(target)
    assert sorted(after) == sorted(before)
    for slot, (position, clients) in after.items():
        assert position > before[slot][0]
        assert clients == before[slot][1]
    assert any(clients for _, clients in after.values())


def stand(cluster: Cluster) -> dict[int, tuple[int, int]]:
    """Position and number of remembered clients of every slot."""
    out = {}
    primary = cluster.view.owners()[:, 0]
    for _, service in cluster.services.values():
        me = [s.incarnation for s in cluster.view.servers].index(service.store.incarnation)
        for block in service.store.export(np.flatnonzero(primary == me).astype(np.int64)):
            counts = np.diff(block.clients.offsets).tolist()
            out |= dict(zip(block.slots.tolist(), zip(block.last.tolist(), counts, strict=True), strict=True))
    return out


def test_lost_slots_come_back_and_the_others_keep_what_is_newer(clusters, tmp_path):
    cluster = clusters(3, cluster=5)
    cluster.create(ITEM, USER, WHOLE)
    train(cluster)
    cluster.save(tmp_path, "one")
    before = rows(cluster)
    with cluster.client() as client:
        client.assign("user", IDS, np.full((len(IDS), 8), 7.0, np.float32))
    cluster.kill("s1")
    lost = int(cluster.view.lost().sum())
    assert lost > 0
    with pytest.raises(SlotsLost), cluster.client() as client:
        client.pull("user", IDS, timeout=2.0)
    with pytest.raises(SlotsLost, match=f"{lost} slots are lost: nothing was saved"):
        cluster.save(tmp_path)
    moved = cluster.restore(tmp_path)
    assert moved.slots == lost
    after = rows(cluster)
    newer = (after["user"] == 7.0).all(axis=1)
    assert 0 < newer.sum() < len(IDS)
    np.testing.assert_array_equal(after["user"][~newer], before["user"][~newer])
    np.testing.assert_array_equal(after["item"], before["item"])


def test_a_table_made_later_is_not_given_up_silently(clusters, tmp_path):
    cluster = clusters(2, cluster=6)
    cluster.create(ITEM)
    cluster.save(tmp_path, "one")
    cluster.create(USER)
    cluster.kill("s0")
    with pytest.raises(
        RequestError, match="the checkpoint has no table 'user', whose rows in lost slots would be gone"
    ):
        cluster.restore(tmp_path)
    assert cluster.view.lost().any()
    cluster.restore(tmp_path, accept_loss=True)
    assert not cluster.view.lost().any()


def test_a_damaged_block_is_found_before_the_cluster_gives_up_its_tables(clusters, tmp_path):
    cluster = clusters(2, cluster=7)
    cluster.create(ITEM, USER, WHOLE)
    train(cluster)
    path = Path(cluster.save(tmp_path, "one").path)
    file = path / "0000.blocks"
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    before = rows(cluster)
    with pytest.raises(RequestError, match=r"the cluster has tables \(item, user, whole\)"):
        cluster.restore(tmp_path)
    with pytest.raises(CheckpointError, match=r"0000\.blocks is damaged"):
        cluster.restore(tmp_path, replace_tables=True)
    assert_equal(rows(cluster), before)
    file.write_bytes(good)
    cluster.restore(tmp_path, replace_tables=True)
    assert_equal(rows(cluster), before)


def test_a_damaged_block_leaves_an_empty_cluster_s_slots_lost(clusters, tmp_path):
    saved = clusters(2, cluster=17)
    saved.create(ITEM, USER, WHOLE)
    train(saved)
    file = Path(saved.save(tmp_path, "one").path) / "0000.blocks"
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    cluster = clusters(2, cluster=18)
    with pytest.raises(CheckpointError, match=r"0000\.blocks is damaged"):
        cluster.restore(tmp_path)
    with pytest.raises(SlotsLost), cluster.client() as client:
        client.pull("item", IDS, timeout=2.0)
    file.write_bytes(good)
    cluster.restore(tmp_path, replace_tables=True)
    assert_equal(rows(cluster), rows(saved))


def test_another_fingerprint_is_refused(clusters, tmp_path):
    cluster = clusters(1, cluster=8)
    save(Storage(tmp_path), cluster.view.servers, Access(TOKEN), "0123456789abcdef")
    with pytest.raises(CheckpointError, match="it needs the same settings"):
        cluster.restore(tmp_path)


def test_an_empty_cluster_is_saved_and_restored(clusters, tmp_path):
    assert clusters(1, cluster=9).save(tmp_path, "one").rows == 0
    target = clusters(2, cluster=10)
    target.create(ITEM)
    assert target.restore(tmp_path, replace_tables=True).rows == 0
    assert target.view.tables == ()
    assert all(s.alive for s in target.view.servers)


def test_a_checkpoint_names_the_models_that_its_rows_go_with(clusters, tmp_path):
    for folder in ("ctr/1", "ctr/10", "ctr/9", "ctr/draft", "cvr/2", "empty", ".cache/3"):
        (tmp_path / "models" / folder).mkdir(parents=True)
    versions = {"ctr": "10", "cvr": "2"}
    assert newest_versions(tmp_path / "models") == versions
    with pytest.raises(CheckpointError, match=r"the models in \S+nowhere cannot be listed: No such file"):
        newest_versions(tmp_path / "nowhere")
    cluster = clusters(1, cluster=11)
    cluster.create(ITEM)
    cluster.save(tmp_path / "saved", models=versions)
    cluster.save(tmp_path / "saved", incremental=True)
    assert [m.models for m in checkpoints(Storage(tmp_path / "saved"))] == [versions, {}]
    order = {
        "what": "save", "directory": str(tmp_path / "jobs"), "full_every": 3, "keep": 2, "token": TOKEN, "tls_ca": "",
        "servers": [[s.name, s.incarnation, list(s.addresses)] for s in cluster.view.servers],
        "fingerprint": CONFIG.fingerprint, "cluster": cluster.view.cluster,
    }  # fmt: skip
    for models in (tmp_path / "models", tmp_path / "nowhere"):  # rows are saved whatever becomes of the models
        work(order | {"models": str(models)})
    assert [m.models for m in checkpoints(Storage(tmp_path / "jobs"))] == [versions, {}]
    assert clusters(1, cluster=12).restore(tmp_path / "jobs").models == {}


def test_the_controllers_job_saves_prunes_and_restores_by_the_servers_alone(clusters, tmp_path):
    """As its process does: an order of plain data, the controller reached through a server."""
    cluster = clusters(3, cluster=11)
    cluster.create(ITEM, USER, WHOLE)
    train(cluster)

    def order(what: str, **other: Any) -> dict[str, Any]:
        servers = [[s.name, s.incarnation, list(s.addresses)] for s in cluster.view.servers if s.alive]
        plain = {
            "what": what, "directory": str(tmp_path), "full_every": 3, "keep": 1, "servers": servers, "token": TOKEN,
            "tls_ca": "", "fingerprint": CONFIG.fingerprint, "cluster": cluster.view.cluster, "models": "", **other,
        }  # fmt: skip
        return json.loads(json.dumps(work(json.loads(json.dumps(plain)))))

    parents = []
    for number in range(4):
        with cluster.client() as client:
            client.push("item", IDS[:20], np.full((20, 4), number, np.float32))
        told = order("save")
        parents.append(told["parent"])
    assert [bool(p) for p in parents] == [False, True, True, False]
    assert len(told["pruned"]) == 3
    before = rows(cluster)
    with pytest.raises(CheckpointError, match="there is no checkpoint of this cluster in"):
        order("restore", cluster=12)
    cluster.kill("s1")
    told = order("restore")
    assert told["rows"] > 0
    assert not cluster.view.lost().any()
    assert_equal(rows(cluster), before)


def test_tables_return_in_the_slots_that_they_had_and_an_older_checkpoint_has_not(clusters, tmp_path):
    cluster = clusters(2, cluster=21)
    cluster.create(ITEM, USER, WHOLE)
    train(cluster)
    cluster.save(tmp_path / "old")
    cluster.change(Place({"item": replace(ITEM, placement="whole").to_plain()}, "whole", 1))
    cluster.change(Place({"whole": replace(WHOLE, placement="sharded").to_plain()}, "sharded", 1))
    before = rows(cluster)
    saved = cluster.save(tmp_path / "new")
    assert saved.slots == 3 * 64
    target = clusters(3, cluster=22)
    target.restore(tmp_path / "new")
    assert_equal(rows(target), before)
    group = target.view.group(target.view.table("item").group)
    assert (group.placement, group.slots, len(np.unique(group.owners))) == ("whole", 64, 1)
    cluster.kill("s1")
    with pytest.raises(
        RequestError,
        match=r"has other slots, or an earlier state, of table '\w+', whose rows in lost slots would be gone",
    ):
        cluster.restore(tmp_path / "old")
    cluster.restore(tmp_path / "new")
    assert_equal(rows(cluster), before)
