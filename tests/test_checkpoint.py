"""Checkpoints come back bit for bit, or not at all and in one sentence."""

import dataclasses
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tlt_jax import sharding
from tlt_jax.checkpoint import Checkpoints
from tlt_jax.config import CheckpointConfig, MeshConfig
from tlt_jax.types import UserError

CONFIG = CheckpointConfig(every=1, keep=2)
RECORD = {"steps_done": 4, "seed": 0, "controller": {"idle_credit": 0.37}}


def _arrays(seed=0):
    """A tree as a run has it: sharded and whole leaves, optimizer state, and what is absent."""
    mesh = sharding.make_mesh(MeshConfig(slices=2, tensor=2))
    rng = np.random.default_rng(seed)

    def put(x, *axes):
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))

    params = {"w": put(rng.standard_normal((8, 6)).astype(np.float32), "slice", "tensor")}
    params["b"] = put(jnp.asarray(rng.standard_normal(4), jnp.bfloat16))
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    return {
        "learner": {"params": params, "opt_state": jax.jit(tx.init)(params)},
        "reference": params["w"] + 1,
        "drafter": None,
        "buffer": {"row": put(np.array([3, 1], np.int32), "slice")},
    }


def _same(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)

    def check(a, b):
        assert a.dtype == b.dtype and a.sharding.is_equivalent_to(b.sharding, b.ndim)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))

    jax.tree.map(check, got, wanted)


@pytest.fixture
def open_checkpoints(tmp_path):
    """Function (folder, config) -> Checkpoints that are closed at the end."""
    opened = []

    def start(folder=tmp_path, config=CONFIG):
        opened.append(Checkpoints(pathlib.Path(folder), config))
        return opened[-1]

    yield start
    for checkpoints in opened:
        checkpoints.close()


def _saved(checkpoints, *steps):
    for step in steps:
        checkpoints.save(step, _arrays(step), RECORD | {"steps_done": step})
    checkpoints.close()


def test_a_fresh_workdir_has_none(open_checkpoints):
    assert open_checkpoints().latest() is None


def test_a_checkpoint_comes_back_bit_for_bit(open_checkpoints):
    _saved(open_checkpoints(), 4)
    again = open_checkpoints()
    assert again.latest() == 4
    arrays, record = again.restore(4, _arrays(9))
    _same(arrays, _arrays(4))
    assert record == RECORD


def test_the_newest_are_kept(open_checkpoints, tmp_path):
    _saved(open_checkpoints(), 1, 2, 3)
    assert open_checkpoints().latest() == 3
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]


def test_arrays_may_be_donated_as_soon_as_saving_began(open_checkpoints):
    """The step after a checkpoint overwrites them while they are still being written."""
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 7, tree), donate_argnums=0)
    checkpoints = open_checkpoints()
    big = jax.device_put(np.arange(1 << 20, dtype=np.float32).reshape(1024, 1024), jax.devices()[0])
    for step in range(1, 4):
        state = {"x": big + step}
        checkpoints.save(step, state, RECORD)
        for _ in range(3):
            state = overwrite(state)
        jax.block_until_ready(state)
        assert float(state["x"][3, 3]) == -7
    checkpoints.close()
    again = open_checkpoints()
    for step in (2, 3):
        arrays, _ = again.restore(step, {"x": big})
        np.testing.assert_array_equal(np.asarray(arrays["x"]), np.asarray(big) + step)


def test_restored_arrays_may_be_donated(open_checkpoints):
    _saved(open_checkpoints(), 4)
    arrays, _ = open_checkpoints().restore(4, _arrays(9))
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    wanted = jax.tree.map(lambda x: x + 1, _arrays(4))
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(step(x), y), arrays, wanted)


def _one_sentence(error, *words):
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text


@pytest.mark.parametrize(
    "like",
    [
        pytest.param(lambda a: a | {"reference": jnp.zeros((8, 5))}, id="another shape"),
        pytest.param(lambda a: a | {"drafter": jnp.zeros(3)}, id="something more"),
        pytest.param(lambda a: a | {"buffer": None}, id="something less"),
        pytest.param(lambda a: {k: v for k, v in a.items() if k != "learner"}, id="a part missing"),
    ],
)
def test_a_checkpoint_of_another_configuration(open_checkpoints, like):
    _saved(open_checkpoints(), 4)
    with pytest.raises(UserError) as error:
        open_checkpoints().restore(4, like(_arrays()))
    _one_sentence(error, "checkpoints/4", "remove")


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A workdir with checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("sound")
    _saved(Checkpoints(folder, CONFIG), 2, 4)
    return folder


def _files(folder):
    root = folder / "checkpoints" / "4"
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())


DAMAGE = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "garbage": lambda content: b"\xff\x00" * (len(content) // 2 + 1),
    "one byte": lambda content: (
        content[: len(content) // 2]
        + bytes([(content[len(content) // 2] ^ 0x55)])
        + content[len(content) // 2 + 1 :]
    ),
    "gone": None,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_told_in_a_sentence_or_does_not_matter(sound, tmp_path, damage):
    """Each file of a checkpoint in turn: never another exception, and never other numbers.

    Afterwards the workdir still serves: without that folder the checkpoint before it comes back.
    """
    told = 0
    for number, name in enumerate(_files(sound)):
        workdir = tmp_path / str(number)
        shutil.copytree(sound, workdir)
        path = workdir / "checkpoints" / "4" / name
        content = path.read_bytes()
        if DAMAGE[damage] is None:
            path.unlink()
        elif not content:
            continue
        else:
            path.write_bytes(DAMAGE[damage](content))
        checkpoints = Checkpoints(workdir, CONFIG)
        try:
            arrays, record = checkpoints.restore(4, _arrays(9))
        except UserError as error:
            told += 1
            assert "\n" not in str(error) and "checkpoints/4" in str(error), (name, str(error))
        else:
            _same(arrays, _arrays(4))
            assert record == RECORD, name
        finally:
            checkpoints.close()
        shutil.rmtree(workdir / "checkpoints" / "4")
        checkpoints = Checkpoints(workdir, CONFIG)
        assert checkpoints.latest() == 2
        _same(checkpoints.restore(2, _arrays(9))[0], _arrays(2))
        checkpoints.close()
    assert told >= 2, "nothing that was damaged was read"


def test_a_folder_without_its_files(sound, tmp_path):
    shutil.copytree(sound, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / "4"
    shutil.rmtree(folder)
    folder.mkdir()
    checkpoints = Checkpoints(tmp_path / "run", dataclasses.replace(CONFIG))
    if checkpoints.latest() == 4:
        with pytest.raises(UserError) as error:
            checkpoints.restore(4, _arrays(9))
        _one_sentence(error, "checkpoints/4", "remove")
    checkpoints.close()


def test_what_a_killed_process_left_half_written_is_not_a_checkpoint(sound, tmp_path):
    """Orbax writes under another name and renames when all is there."""
    shutil.copytree(sound, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    shutil.copytree(folder / "4", folder / "6.orbax-checkpoint-tmp-123")
    checkpoints = Checkpoints(tmp_path / "run", CONFIG)
    assert checkpoints.latest() == 4
    _same(checkpoints.restore(4, _arrays(9))[0], _arrays(4))
    _saved(checkpoints, 6)
    again = Checkpoints(tmp_path / "run", CONFIG)
    assert again.latest() == 6
    again.close()
