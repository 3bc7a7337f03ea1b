import contextlib
import copy
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import types

import jax
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import safetensors
import safetensors.numpy
import toy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shampax.configs import base
from shampax.framework.base.errors import UserError
from shampax.framework.checkpoint import ownership, saving, store, takeover, verify, workarounds
from shampax.framework.checkpoint.origin import Origin
from shampax.framework.checkpoint.record import Ranking, Record
from shampax.framework.sharding import meshes, placement
from shampax.framework.step import state
from shampax.framework.train import train
from shampax.launch.checkpoint import main
from shampax.optimizers import ShampooOptions
from shampax.optimizers.checkpoint.inheritance import Made

SHAMPOO = "shampax.optimizers.shampoo:ShampooOptions"
SUMS = "SHA256SUMS-0-of-1"
OPTIONS = {"block_size": 8, "interval": 3, "refresh": "host"}
BUCKET = "opt_state/buckets/8x8_all_p2"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Train 6 steps on 2 devices with a save every 2 steps; resume the end on 4 devices and save again."""
    root = tmp_path_factory.mktemp("runs")

    def config(**changes):
        config = base.get_config()
        config.task, config.data = base.component("toy:ToyTask"), base.component("toy:ToyData")
        config.optimizer = base.component(SHAMPOO, **OPTIONS)
        config.duration, config.batch_size, config.schedule.learning_rate = "6 steps", 8, 0.02
        config.evaluation.every = config.checkpoint.every = "2 steps"
        config.checkpoint.keep_last = 3
        config.update_from_flattened_dict(changes)
        return config

    train(config(), root / "two", devices=jax.devices()[:2])
    train(config(resume_from=str(root / "two")), root / "four", devices=jax.devices()[:4])
    return root


@pytest.fixture
def workdir(runs, tmp_path):
    """Copy the run on 2 devices, to damage the copy."""
    return shutil.copytree(runs / "two", tmp_path / "two", ignore=shutil.ignore_patterns("data", "events.*"))


@pytest.fixture
def newest(workdir):
    return workdir / "checkpoints" / "6"


def ran(*arguments):
    """Run the command; return its exit code, lines of stdout and lines of stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(map(str, arguments)))
    return code, out.getvalue().splitlines(), err.getvalue().splitlines()


def refused(*arguments):
    """Run a command that must fail; return its one line."""
    code, out, err = ran(*arguments)
    assert (code, out, len(err)) == (2, [], 1)
    assert err[0].startswith("error: ")
    return err[0]


def rewrite(path, item, change):
    """Change a checkpoint's record or manifest and update the checksums."""
    file = path / item / "metadata"
    content = json.loads(file.read_text())
    content = change(content) or content
    file.write_text(json.dumps(content))
    verify.write(path, 0, 1)


def evaluate(path, loss):
    """Replace the evaluation of a checkpoint."""
    found = store.record(path)
    store.write_evaluation(path, found.with_evaluation({"loss": loss}, Ranking()))


def numpy_arrays(path):
    """Read every array of a checkpoint, by path, without our code."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = checkpointer.metadata(path / "state").item_metadata.tree
        restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        restored = checkpointer.restore(path / "state", restore_args=restore_args)
    leaves = jax.tree_util.tree_leaves_with_path(restored)
    return {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf for keys, leaf in leaves}


def save_again(path, change):
    """Replace the arrays of a checkpoint by the result of `change` and update the checksums."""
    arrays = numpy_arrays(path)
    arrays = change(arrays) or arrays
    tree = {}
    for name, value in arrays.items():
        *parents, last = name.split("/")
        at = tree
        for parent in parents:
            at = at.setdefault(parent, {})
        at[last] = value
    shutil.rmtree(path / "state")
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(path.absolute() / "state", tree)
    verify.write(path, 0, 1)


def snapshot(root):
    return {path: path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


# list


def test_list_marks_newest_best_damaged_and_unhashed(workdir):
    directory = workdir / "checkpoints"

    evaluate(directory / "4", 0.125)
    shutil.copytree(directory / "6", directory / "8")
    (directory / "8" / SUMS).unlink()
    (directory / "9.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    shutil.copytree(directory / "6", workdir / "damaged" / "7")
    size = sum(path.stat().st_size for path in (directory / "6").rglob("*") if path.is_file())
    size -= sum((directory / "6" / name).stat().st_size for name in (SUMS, "evaluation.json"))

    code, out, err = ran("list", workdir)
    rows = {line.split()[0]: line for line in out}
    assert (code, err) == (0, [])
    assert list(rows) == ["step", "2", "4", "6", "8", "damaged/7"]
    assert re.search(r" 0\.1250 +best$", rows["4"])
    assert re.search(rf" {size / 1e6:.1f} MB ", rows["6"])
    assert re.search(r" \d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", rows["2"]) and "newest" not in rows["2"]
    assert rows["8"].endswith("newest, not all checksums")


# inspect


def test_inspect_shows_everything(runs):
    path = runs / "four" / "checkpoints" / "6"
    arrays = numpy_arrays(path)
    code, out, err = ran("inspect", runs / "four")
    assert (code, err) == (0, [])
    text = "\n".join(out)
    assert re.search(r"^step 6, 384 tokens, .* 0 steps skipped$", text, re.M)
    assert re.search(r"^best evaluation: after step 6: .*loss 2\.\d{4}$", text, re.M)
    assert re.search(r"^mesh: data 4, .* \(4 devices, processes: 1\)$", text, re.M)
    sizes = {
        "params": (3, (16 * 16 + 2 * 16 * 32) * 4),
        r"opt_state/buckets/\*/roots/statistics": (2, 2 * 16 * 9 * 4 * 4),
        r"opt_state/buckets/\*/roots/roots": (2, 2 * 16 * 8 * 8 * 4),
        r"opt_state/buckets/\*/in_flight/statistics": (2, 2 * 16 * 9 * 4 * 4),
        "total": (len(arrays), sum(x.nbytes for x in arrays.values())),
    }
    for part, (count, size) in sizes.items():
        assert re.search(rf"^{part} +{count} +{size:,}$", text, re.M)
    assert re.search(r"^hidden/kernel +16x32 +float32 +shampoo 8x8 p2 x8 +512$", text, re.M)
    assert re.search(r"^8x8_all_p2 +8x8 +16 +16 +hidden/kernel x8, out/kernel x8$", text, re.M)
    assert "roots/1" not in text
    text = "\n".join(ran("inspect", path, "--arrays")[1])
    for name, x in arrays.items():
        shape = "x".join(map(str, x.shape)) or "scalar"
        assert re.search(rf"^{name} +{shape} +{x.dtype.name} +{x.nbytes:,}$", text, re.M)


def test_inspect_of_an_optimizer_without_blocks(tmp_path):
    path = save_plain(tmp_path, {"a": {"w": np.ones((4, 3), np.float32)}}, tx=optax.adam(1e-3))
    code, out, _ = ran("inspect", path)
    assert code == 0
    assert re.search(r"^opt_state +3 +100$", "\n".join(out), re.M)
    assert "last evaluation: after step 3: loss nan" in out
    assert not any(line.startswith("bucket") for line in out)


def test_a_workdir_stands_for_its_newest_complete_checkpoint(workdir):
    data = largest(workdir / "checkpoints" / "6")
    data.write_bytes(data.read_bytes()[:-1])
    code, out, err = ran("inspect", workdir)
    assert (code, out[0]) == (0, f"checkpoint {workdir / 'checkpoints' / '4'}")
    assert len(err) == 1
    assert re.match(r"warning: checkpoint .*/6 is damaged \(state/.* does not have its checksum\); using .*/4$", err[0])
    workdir = workdir.rename(workdir.with_name("7"))
    assert ran("inspect", workdir)[1][0] == f"checkpoint {workdir / 'checkpoints' / '4'}"
    for step in (2, 4):
        (workdir / "checkpoints" / str(step) / "record" / "metadata").unlink()
    assert "every checkpoint of" in refused("inspect", workdir)


def save_plain(tmp_path, params, *, tx, step=3, model_state=None, name="plain"):
    """Save a checkpoint of an optax optimizer on one device."""
    mesh = meshes.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    scalar = np.int32(step)
    whole = state.TrainState(scalar, params, tx.init(params), model_state or {}, {"skipped": np.int32(0)})
    whole = jax.device_put(whole, meshes.replicated(mesh))
    spec = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), whole.params)
    manifest = takeover.describe(tx, "an optimizer", spec, mesh.shape)
    record = Record(step).with_evaluation({"loss": math.nan}, Ranking())
    saver = saving.Checkpoints(tmp_path / name, keep_last=9, keep_best=0, ranking=Ranking())
    with contextlib.closing(saver):
        saver.save(whole, record, manifest)
        saver.confirm()
    return tmp_path / name / "checkpoints" / str(step)


def largest(path):
    return max((file for file in (path / "state").rglob("d/*") if file.is_file()), key=lambda file: file.stat().st_size)


# verify


FILES = {
    "arrays": lambda path: largest(path),
    "metadata of arrays": lambda path: path / "state" / "_METADATA",
    "index of arrays": lambda path: path / "state" / "manifest.ocdbt",
    "manifest": lambda path: path / "manifest" / "metadata",
    "record": lambda path: path / "record" / "metadata",
}
DAMAGE = {
    "a flipped bit": lambda file: file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:]),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "missing": lambda file: file.unlink(),
    "a pipe": lambda file: (file.unlink(), os.mkfifo(file)),
}


def each_file_and_each_damage():
    """Return all pairs of file and damage; the fast tier has every file and every damage once."""
    return [
        pytest.param(kind, damage, marks=() if number % len(DAMAGE) == other else pytest.mark.slow)
        for number, kind in enumerate(FILES)
        for other, damage in enumerate(DAMAGE)
    ]


@pytest.mark.parametrize(("kind", "damage"), each_file_and_each_damage())
def test_verify_names_each_damaged_file(workdir, newest, kind, damage):
    file = FILES[kind](newest)
    DAMAGE[damage](file)
    name = file.relative_to(newest)
    fault = {"missing": "is missing", "a pipe": "is not a file"}.get(damage, "does not have its checksum")
    assert ran("verify", newest) == (1, [f"{newest}: {name} {fault}"], [])
    code, out, _ = ran("verify", workdir)
    whole = [f"{newest.with_name(step)}: intact" for step in "24"]
    assert (code, out) == (1, [*whole, f"{newest}: {name} {fault}"])
    assert ran("verify", newest, newest.with_name("4"))[0] == 1
    for arguments in (["diff", newest, newest.with_name("4")], ["export", newest, workdir / "x.safetensors"]):
        assert re.match(rf"error: every checkpoint of .*/6 is damaged \(6: {name} {fault}\)", refused(*arguments))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda path: (path / SUMS).write_text("nonsense\n"), f"{SUMS} has a line that is not a checksum"),
        (lambda path: (path / SUMS).write_bytes(b"\xff"), f"{SUMS} has a line that is not a checksum"),
        (lambda path: (path / "state" / "more").write_text("x"), "state/more has no checksum"),
    ],
)
def test_verify_needs_the_checksums(newest, change, fault):
    change(newest)
    code, out, err = ran("verify", newest)
    assert (code, len(out), err) == (1, 1, [])
    assert out[0].startswith(f"{newest}: {fault}")


def test_verify_without_checksums_reads_all_arrays(newest):
    """Fault: a checkpoint whose run ended before it was hashed counts as damaged, or as intact without reading it."""
    (newest / SUMS).unlink()
    assert ran("verify", newest) == (0, [f"{newest}: intact"], [])
    largest(newest).unlink()
    code, out, _ = ran("verify", newest)
    assert (code, len(out)) == (1, 1) and "cannot be read" in out[0]


def test_verify_of_an_intact_checkpoint(runs):
    steps = [f"{runs / 'two' / 'checkpoints' / step}: intact" for step in "246"]
    assert ran("verify", runs / "two", runs / "four" / "checkpoints" / "6") == (
        0,
        [*steps, f"{runs / 'four' / 'checkpoints' / '6'}: intact"],
        [],
    )


def bucket_of(manifest):
    return manifest["state"][""]["buckets"]["8x8_all_p2"]


MANIFESTS = {
    "not an object": (lambda m: [m], "is not a JSON object"),
    "another format": (lambda m: m.update(format=2), "its manifest has the format 2, not 1"),
    "an invalid shape": (lambda m: m["parameters"]["embed/kernel"].update(shape="16"), "is damaged"),
    "no mesh": (lambda m: m.pop("mesh") and None, "is damaged \\('mesh'\\)"),
    "a block in two slots": (
        lambda m: bucket_of(m)["slots"].__setitem__(0, 2),
        "do not hold each of its 16 blocks once",
    ),
    "too few slots": (
        lambda m: bucket_of(m)["slots"].pop() and None,
        "out/kernel has 8 blocks, 7 slots are left",
    ),
    "blocks of another shape": (
        lambda m: bucket_of(m).update(shape=[8, 16]),
        r"moments/momentum has the shape \[16, 8, 8\]; it should have \[16, 8, 16\]",
    ),
    "other pieces": (
        lambda m: bucket_of(m)["parameters"][0].update(pieces=[1, 8]),
        r"hidden/kernel has sides of \[16, 32\], its blocks do not cover them",
    ),
    "an axis in no side": (
        lambda m: bucket_of(m)["parameters"][1].update(sides=[[], [0]]),
        r"out/kernel has 2 axes, its sides and stack name \[0\]",
    ),
    "no buckets": (lambda m: m.update(state={"": {}}), r"invalid manifest of Distributed Shampoo: KeyError 'buckets'"),
    "a missing bucket": (
        lambda m: m["state"][""]["buckets"].clear(),
        f"{BUCKET.removeprefix('opt_state/')}/.* is an array that it does not describe",
    ),
    "a missing diagonal parameter": (
        lambda m: m["state"][""]["diagonal"].clear(),
        "diagonal/embed.kernel/.* is an array that it does not describe",
    ),
}


@pytest.mark.parametrize("what", MANIFESTS)
def test_verify_finds_where_a_manifest_contradicts_the_arrays(newest, what):
    change, fault = MANIFESTS[what]
    rewrite(newest, "manifest", change)
    code, out, err = ran("verify", newest)
    assert (code, err) == (1, [])
    assert all(line.startswith(f"{newest}: ") for line in out)
    assert any(re.search(fault, line) for line in out), out
    refused("inspect", newest)


def test_verify_finds_a_record_of_another_step(newest):
    """Fault: a checkpoint whose directory was renamed is resumed from as if it were of that step."""
    rewrite(newest, "record", lambda record: record.update(step=5))
    assert ran("verify", newest)[1] == [f"{newest}: checkpoint {newest}: its record is of step 5; use another one"]


@pytest.mark.parametrize(
    "field", ["roots/statistics/1", "roots/roots/0", "roots/refreshed", "graft_ratio", "in_flight/stamp"]
)
def test_verify_reports_a_missing_optimizer_array(newest, field):
    """Fault: missing state is initialised without an error."""
    save_again(newest, lambda arrays: arrays.pop(f"{BUCKET}/{field}") is None)
    code, out, _ = ran("verify", newest)
    assert code == 1
    assert f"buckets/8x8_all_p2/{field} is missing" in out[0]
    assert f"{field} is missing" in refused("diff", newest, newest.with_name("4"))


# diff


def test_diff_compares_blocks_in_different_slots(runs):
    two, four = (numpy_arrays(runs / name / "checkpoints" / "6") for name in ("two", "four"))
    assert any(not np.array_equal(two[name], four[name]) for name in two if name.startswith(BUCKET))
    code, out, err = ran("diff", runs / "two", runs / "four")
    assert (code, err) == (0, [])
    fields = len([name for name in two if name.startswith(BUCKET)]) - 1
    others = len([name for name in two if not name.startswith(BUCKET)])
    assert out == [
        f"A: {runs / 'two' / 'checkpoints' / '6'}",
        f"B: {runs / 'four' / 'checkpoints' / '6'}",
        f"{others + 2 * fields} equal, 0 different",
    ]
    code, out, _ = ran("diff", runs / "two", runs / "two" / "checkpoints" / "4")
    assert code == 1 and any(line.startswith("params/out/kernel: 512 of 512 elements differ") for line in out)


def test_diff_shows_size_and_place_of_differences(runs, newest):
    manifest = json.loads((newest / "manifest" / "metadata").read_text())
    slots = bucket_of(manifest)["slots"]
    expected = []

    def change(arrays):
        param = arrays["params/embed/kernel"]
        expected.append(np.sqrt(2.0) * 0.5 / np.linalg.norm(param.astype(np.float64)))
        param[3, :2] -= np.float32(0.5)
        # Blocks 8 to 15 of the bucket belong to out/kernel.
        arrays[f"{BUCKET}/roots/roots/1"][slots.index(11), 2, 3] = np.nan
        arrays[f"{BUCKET}/roots/failures"][slots.index(2)] += 7
        arrays["model_state/counters/batches"] = arrays["model_state/counters/batches"].astype(np.int64)
        arrays["model_state/counters/more"] = np.zeros(3, np.float32)
        del arrays["guard/clipped"]

    save_again(newest, change)
    code, out, err = ran("diff", runs / "four", newest)
    assert (code, err) == (1, [])
    assert sorted(out[2:-1]) == [
        "guard/clipped: only in A",
        "model_state/counters/batches: int32[] in A, int64[] in B",
        "model_state/counters/more: only in B",
        "opt_state/roots/failures of hidden/kernel: 1 of 8 elements differ, by at most 7; "
        "norm of the difference inf of A's",
        "opt_state/roots/roots/1 of out/kernel: 1 of 512 elements differ, by at most nan; "
        "norm of the difference nan of A's",
        "params/embed/kernel: 2 of 256 elements differ, by at most 0.5; "
        f"norm of the difference {expected[0]:.3g} of A's",
    ]
    assert out[-1].endswith(" equal, 6 different")
    assert ran("diff", newest, newest)[0] == 0  # includes the NaN
    other = shutil.copytree(newest, newest.with_name("other"))

    def change_more(arrays):
        root = arrays[f"{BUCKET}/roots/roots/1"][slots.index(8)]
        root[0, 0], root[1, 0] = root[0, 0] + 1, np.nextafter(root[1, 0], np.float32(9))

    save_again(other, change_more)
    assert ran("diff", newest, other)[1][2].startswith(
        "opt_state/roots/roots/1 of out/kernel: 2 of 512 elements differ, by at most 1; "
    )


def test_diff_of_other_blocks_compares_only_the_parameters(tmp_path):
    params = {"w": np.arange(96, dtype=np.float32).reshape(12, 8)}

    def checkpoint(size):
        tx = ShampooOptions(block_size=size).build(0.1, mesh=None, axis_names=None, param_specs=None)
        return save_plain(tmp_path, params, tx=tx, name=str(size))

    code, out, _ = ran("diff", checkpoint(4), checkpoint(8))
    assert code == 1
    assert "opt_state/roots/statistics/0 of w: is cut into other blocks" in out
    assert not any(line.startswith("params/w") for line in out)


def test_diff_of_another_optimizer_compares_by_name(runs, tmp_path):
    other = save_plain(tmp_path, {"w": np.ones((2, 2), np.float32)}, tx=optax.sgd(0.1, momentum=0.9), step=6)
    code, out, _ = ran("diff", other, runs / "two")
    assert code == 1
    assert {"params/w: only in A", "opt_state/0/trace/w: only in A", f"{BUCKET}/block: only in B"} <= set(out)


# export


def test_export_keeps_every_bit(runs, tmp_path, monkeypatch):
    file, arrays = tmp_path / "x.safetensors", numpy_arrays(runs / "four" / "checkpoints" / "6")
    monkeypatch.chdir(runs)
    code, out, err = ran("export", "four", file)
    assert (code, err) == (0, [])
    assert out == [f"{file}: 3 arrays, {file.stat().st_size:,} bytes, from four/checkpoints/6"]
    loaded = safetensors.numpy.load_file(file)
    assert sorted(loaded) == ["embed.kernel", "hidden.kernel", "out.kernel"]
    for key, value in loaded.items():
        np.testing.assert_array_equal(value, arrays[f"params/{key.replace('.', '/')}"], strict=True)
    with safetensors.safe_open(file, "np") as opened:
        assert opened.metadata() == {"format": "flax", "step": "6", "source": "four/checkpoints/6"}
    before = file.read_bytes()
    assert "--force" in refused("export", "four", file)
    assert file.read_bytes() == before
    assert ran("export", "four", file, "--force", "--model_state")[0] == 0
    loaded = safetensors.numpy.load_file(file)
    assert (len(loaded), loaded["counters.batches"]) == (4, 6)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_export_of_bfloat16_and_of_colliding_names(tmp_path):
    half = (np.arange(12).reshape(3, 4) / 7).astype(ml_dtypes.bfloat16)
    path = save_plain(tmp_path, {"a": {"w": half, "n": np.array(3, np.int32)}}, tx=optax.identity())
    assert ran("export", path, tmp_path / "x")[0] == 0
    loaded = safetensors.numpy.load_file(tmp_path / "x")
    assert loaded["a.w"].dtype == ml_dtypes.bfloat16 and loaded["a.w"].tobytes() == half.tobytes()
    assert (loaded["a.n"].shape, int(loaded["a.n"])) == ((), 3)
    path = save_plain(tmp_path, {"a.w": half, "a": {"w": half}}, tx=optax.identity(), name="meet")
    assert "params/a/w and params/a.w would both have the key 'a.w'" in refused("export", path, tmp_path / "y")


def test_a_failed_export_leaves_no_file(runs, tmp_path, monkeypatch):
    assert "cannot be written" in refused("export", runs / "two", tmp_path / "no" / "x")
    file = tmp_path / "x"
    file.write_text("precious")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert "No space left on device" in refused("export", runs / "two", file, "--force")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x", "precious")]


# prune


def test_prune_keeps_newest_and_best_and_lists_the_deleted(workdir):
    directory = workdir / "checkpoints"
    for step, loss in ((2, math.nan), (4, 0.125), (6, 3.0)):
        evaluate(directory / str(step), loss)
    size = verify.size(directory / "2")
    (workdir / "lock").unlink()
    before = snapshot(workdir)
    code, out, err = ran("prune", workdir, "--keep_last=1", "--keep_best=1", "--dry_run")
    assert (code, err, snapshot(workdir)) == (0, [], before)
    assert out == [
        f"{directory / '4'}: kept",
        f"{directory / '6'}: kept",
        f"{directory / '2'}: would be deleted, {size:,} bytes",
    ]
    code, out, err = ran("prune", workdir, "--keep_last=1", "--keep_best=1")
    assert (code, err) == (0, [])
    assert out[-1] == f"{directory / '2'}: deleted, {size:,} bytes"
    assert sorted(path.name for path in directory.iterdir()) == ["4", "6"]
    assert ran("prune", workdir, "--keep_last=1", "--keep_best=0")[0] == 0
    assert [path.name for path in directory.iterdir()] == ["6"]


def test_prune_never_deletes_the_newest_complete_checkpoint(workdir):
    directory = workdir / "checkpoints"
    (directory / "6" / "manifest" / "metadata").write_text("{}")
    (directory / "8.orbax-checkpoint-tmp").mkdir()
    code, out, _ = ran("prune", workdir, "--keep_last=1", "--keep_best=0")
    assert code == 0
    assert f"{directory / '6'}: damaged, left alone (manifest/metadata does not have its checksum)" in out
    assert sorted(path.name for path in directory.iterdir()) == ["4", "6", "8.orbax-checkpoint-tmp"]
    (directory / "4" / SUMS).write_text("nonsense\n")
    before = snapshot(workdir)
    assert "none is deleted" in refused("prune", workdir, "--keep_last=1", "--keep_best=1")
    assert snapshot(workdir) == before


def test_prune_keeps_at_least_one(workdir):
    before = snapshot(workdir)
    for flags in (["--keep_last=0", "--keep_best=1"], ["--keep_last=1", "--keep_best=-1"]):
        assert "at least" in refused("prune", workdir, *flags)
    assert snapshot(workdir) == before


def test_prune_refuses_while_a_run_uses_the_workdir(workdir):
    with ownership.hold(workdir):
        before = snapshot(workdir)
        assert "is in use by process" in refused("prune", workdir, "--keep_last=1", "--keep_best=0")
        assert snapshot(workdir) == before


@pytest.mark.parametrize(
    "text", ["[]", "[" * 100_000, "\xff", '{"evaluation": 3}', '{"evaluation": {"best_metric": []}}']
)
def test_list_and_prune_refuse_an_unreadable_config(workdir, text):
    (workdir / "config.json").write_bytes(text.encode("latin1"))
    for arguments in (["list", workdir], ["prune", workdir, "--keep_last=1", "--keep_best=1"]):
        assert str(workdir / "config.json") in refused(*arguments)


# errors


VERBS = {
    "list": lambda path: ["list", path],
    "inspect": lambda path: ["inspect", path],
    "verify": lambda path: ["verify", path],
    "diff": lambda path: ["diff", path, path],
    "export": lambda path: ["export", path, path.with_name("x")],
    "prune": lambda path: ["prune", path, "--keep_last=1", "--keep_best=1"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_without_a_checkpoint_there_is_one_line(tmp_path, verb):
    (tmp_path / "7").mkdir()  # a workdir whose name is a number
    (tmp_path / "file").write_text("")
    before = snapshot(tmp_path)
    for name in ("nothing\n", "7", "file"):
        assert str(tmp_path) in refused(*VERBS[verb](tmp_path / name))
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "arguments",
    [[], ["burn"], ["list"], ["prune", "x", "--keep_last=z", "--keep_best=1"], ["prune", "x", "--keep_last=1"]],
)
def test_wrong_usage_is_exit_code_2(arguments):
    assert ran(*arguments)[0] == 2


def test_control_characters_in_names_are_escaped(workdir, newest):
    (newest / "state" / "\x1b[2J\n").write_text("")
    code, out, _ = ran("verify", newest)
    assert (code, out) == (1, [f"{newest}: state/\\x1b[2J\\n has no checksum"])


def test_the_command_uses_no_accelerator_and_one_device(runs):
    """Faults: the command takes the accelerator from a running job; it needs as many devices as the run."""
    done = in_a_process_of_its_own("diff", runs / "two", runs / "four", JAX_PLATFORMS="tpu", JAX_NUM_CPU_DEVICES="1")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].endswith("equal, 0 different")


def test_unreadable_arrays_are_one_line(newest):
    """Fault: TensorStore's messages about reads that were abandoned after the first failure are printed."""
    for file in (newest / "state").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:1000])  # values are truncated, but not their index
    verify.write(newest, 0, 1)
    done = in_a_process_of_its_own("diff", newest, newest.with_name("4"))
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert done.stderr.startswith(f"error: the arrays of checkpoint {newest} cannot be read (")


def test_only_messages_of_abandoned_reads_are_hidden(monkeypatch):
    shown = []
    monkeypatch.setattr(sys, "__unraisablehook__", shown.append)
    gone, other = (types.SimpleNamespace(exc_value=RuntimeError(text)) for text in ("Event loop is closed", "other"))
    workarounds._unraisable(gone)
    workarounds._unraisable(other)
    assert shown == [other]


def test_a_closed_pipe_is_not_a_traceback(runs):
    command = [sys.executable, "-m", "shampax.launch.checkpoint", "list", runs / "two"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == ("", 128 + signal.SIGPIPE)


def in_a_process_of_its_own(*arguments, **environment):
    command = [sys.executable, "-m", "shampax.launch.checkpoint", *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


# fuzzing


JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 40),
        st.sampled_from([-1, 2**31, 2**63, 10**400, 1e300, math.inf, math.nan]),
        st.floats(),
        st.text(max_size=8),
        st.sampled_from(["embed/kernel", "hidden/kernel", "float32", "../../x", "\ud800", "\x1b[2J\n"]),
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=6,
)


def spots(content, at=()):
    """Return the paths of all values, each of which can be changed."""
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    yield at
    for key, value in inner:
        yield from spots(value, (*at, key))


@st.composite
def mutated(draw, content):
    """Draw a real record or manifest with some values replaced, removed or moved."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 2))):
        ways = [way for way in spots(content) if way]
        if not ways:
            break
        way = draw(st.sampled_from(ways))
        parent = content
        for key in way[:-1]:
            parent = parent[key]
        action = draw(st.sampled_from(["replace", "remove", "copy", "nudge"]))
        value = parent[way[-1]]
        if action == "remove":
            del parent[way[-1]]
        elif action == "copy":
            other = content
            for key in draw(st.sampled_from(ways)):
                other = other[key] if not isinstance(other, (int, float, str, type(None))) else other
            parent[way[-1]] = copy.deepcopy(other)
        elif action == "nudge" and type(value) in (int, float):
            parent[way[-1]] = value + draw(st.sampled_from([-1, 1, 8]))
        else:
            parent[way[-1]] = draw(JSON)
    return content


class Bench:
    """The target of a takeover: the toy run on 4 devices."""

    def __init__(self, **options):
        mesh = meshes.make_mesh({"data": 4, "fsdp": 1, "tensor": 1}, jax.devices()[:4])
        task, rows = toy.ToyTask(), toy.ToySource(8, 1)
        spec = {name: jax.ShapeDtypeStruct((8, *x.shape), x.dtype) for name, x in rows[0].items()}
        variables = state.abstract_variables(task, spec)
        axes = task.logical_axes(variables)
        placements = placement.place_all(variables, axes, base.get_config().sharding_rules, mesh)
        self.tx = ShampooOptions(**(OPTIONS | options)).build(
            0.1, mesh=mesh, axis_names=axes["params"], param_specs=None
        )
        self.abstract = state.abstract_state(variables, self.tx, placements, mesh)

    def plan(self, path, renames=()):
        return takeover.plan(Origin("own", path), self.abstract, self.tx, SHAMPOO, renames)

    def take(self, path, arrays):
        taken = self.plan(path)
        like = dict(zip(taken.sources, jax.tree.leaves(taken.spec), strict=True))
        for name, source in taken.sources.items():
            if isinstance(source, Made):
                made = source.make({saved: arrays[saved] for saved in source.names})
                assert made.shape == like[name].shape


@pytest.fixture(scope="module")
def benches():
    return [Bench(), Bench(block_size=16)]


@pytest.fixture
def fuzzed(runs, tmp_path, monkeypatch):
    """Prepare a checkpoint to damage, another one, and its arrays. They are read once, since only texts are damaged."""
    path = shutil.copytree(runs / "two" / "checkpoints" / "6", tmp_path / "two" / "checkpoints" / "6")
    other = runs / "four" / "checkpoints" / "6"
    described = {place: store.arrays(place) for place in (path, other)}
    arrays = {place: store.read(place, dict.fromkeys(described[place])) for place in (path, other)}
    monkeypatch.setattr(store, "arrays", lambda place: dict(described[place]))
    monkeypatch.setattr(store, "read", lambda place, wanted: {name: arrays[place][name].copy() for name in wanted})
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return path, other, arrays[path]


def check_that_nothing_breaks(fuzzed, benches, item, content):
    path, other, arrays = fuzzed
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    (path / item / "metadata").write_bytes(text)
    verify.write(path, 0, 1)
    before = sorted(path.parents[2].rglob("*"))
    for verb in (
        ["inspect", path, "--arrays"],
        ["verify", path],
        ["diff", path, other],
        ["list", path.parents[1]],
    ):
        code, out, err = ran(*verb)
        assert code in (0, 1, 2)
        assert len(err) == (code == 2)
        assert all(line.isprintable() for line in out + err)
    for bench in benches:
        with contextlib.suppress(UserError):
            bench.take(path, arrays)
    with contextlib.suppress(UserError):
        Origin("own", path).record()
    assert sorted(path.parents[2].rglob("*")) == before


def test_a_takeover_reports_every_missing_array(newest, benches):
    """Faults: a step restarts under a record that continues; counts are lost without a message."""
    save_again(newest, lambda arrays: arrays.pop("guard/clipped") is None)
    taken = benches[0].plan(newest)
    assert "guard/clipped: initialised (not saved)" in taken.lines and taken.whole == 3
    for name in ("step", "opt_state/count", f"{BUCKET}/roots/statistics/0"):
        broken = shutil.copytree(newest, newest.with_name(name.replace("/", "_")))
        save_again(broken, lambda arrays: arrays.pop(name) is None)
        with pytest.raises(UserError, match=rf"the manifest of checkpoint .* is damaged \(.*{name.rpartition('/')[2]}"):
            benches[0].plan(broken)


def test_colliding_renames_are_a_user_error(newest, benches):
    with pytest.raises(UserError, match=r"embed/kernel and out/kernel of .* would both be out/kernel.*config.renamed"):
        benches[0].plan(newest, (("embed", "out"),))


def fuzzing(max_examples):
    slow = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=max_examples, deadline=None, suppress_health_check=slow)


@fuzzing(12)
@given(data=st.data())
@pytest.mark.parametrize("item", ["manifest", "record"])
def test_no_text_of_a_checkpoint_breaks_the_command_or_a_takeover(runs, fuzzed, benches, item, data):
    check_a_text(runs, fuzzed, benches, item, data)


@pytest.mark.slow
@fuzzing(60)
@given(data=st.data())
@pytest.mark.parametrize("item", ["manifest", "record"])
def test_none_of_many_texts_of_a_checkpoint_breaks_the_command_or_a_takeover(runs, fuzzed, benches, item, data):
    check_a_text(runs, fuzzed, benches, item, data)


def check_a_text(runs, fuzzed, benches, item, data):
    real = json.loads((runs / "two" / "checkpoints" / "6" / item / "metadata").read_text())
    content = data.draw(st.one_of(*[mutated(real)] * 4, JSON, st.binary(max_size=12)))
    check_that_nothing_breaks(fuzzed, benches, item, content)


@pytest.mark.parametrize("item", ["manifest", "record"])
@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, "NaN", '{"a":' * 50_000, "\xff", ""])
def test_no_text_is_too_deep_or_too_long(fuzzed, benches, item, text):
    check_that_nothing_breaks(fuzzed, benches, item, text.encode("latin1"))
