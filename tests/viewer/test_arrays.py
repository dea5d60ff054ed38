"""Anyone's arrays become layers of heads, and what cannot is named in one line."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attn
from attn.viewer.arrays import MASKED, as_layers, is_masked
from attn.viewer.kinds import as_kinds, as_picture

L, N, T, S = 2, 3, 5, 7  # primes, so that no two axes can be confused


@pytest.fixture
def weights():
    return np.random.default_rng(0).dirichlet(np.ones(S), (L, N, T))  # [L N T S]


def layers(x, batch=None):
    return as_layers(x, batch, "cross")


FORMS = {
    "numpy": lambda w: w,
    "float64 to float32": lambda w: w.astype(np.float64),
    "fortran order": np.asfortranarray,
    "negative strides": lambda w: w[:, :, ::-1].copy()[:, :, ::-1],
    "jax": jnp.asarray,
    "nested lists": lambda w: w.tolist(),
    "list of layers": list,
    "tuple of layers with a batch of one": lambda w: tuple(jnp.asarray(layer[None]) for layer in w),
    "stacked layers with a batch of one": lambda w: w[:, None],
    "lists of heads": lambda w: [list(layer) for layer in w],
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_read(weights, name):
    found = layers(FORMS[name](weights))
    assert [layer.shape for layer in found] == [(N, T, S)] * L
    np.testing.assert_array_equal(np.stack(found), weights.astype(np.float32))


@pytest.mark.parametrize("axes", [2, 3])
def test_fewer_axes_are_one_head_and_one_layer(weights, axes):
    x = weights[0, 0] if axes == 2 else weights[0]
    [layer] = layers(x)
    np.testing.assert_array_equal(layer, np.reshape(x, (-1, T, S)).astype(np.float32))


@pytest.mark.parametrize("dtype", ["bool", "int8", "float16", "bfloat16", "float32"])
def test_dtypes_are_widened(dtype):
    x = jnp.array([[1, 0], [0, 1]], dtype)
    np.testing.assert_array_equal(layers(x)[0][0], np.eye(2, dtype=np.float32))


def test_sharded_arrays_are_gathered(weights):
    mesh = jax.make_mesh((2,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec(None, None, None, "heads")
    sharded = jax.device_put(weights[..., :6], jax.NamedSharding(mesh, spec))
    np.testing.assert_array_equal(np.stack(layers(sharded)), weights[..., :6].astype(np.float32))


class Tensor:
    """What torch's tensors can do, and nothing more: with a graph or on a GPU, `numpy()` alone raises."""

    def __init__(self, array, *, bare=False):
        self.array, self.bare, self.ndim, self.shape = array, bare, array.ndim, array.shape

    def detach(self):
        return Tensor(self.array)

    def cpu(self):
        return Tensor(self.array, bare=True)

    def double(self):
        return Tensor(self.array.astype(np.float64), bare=self.bare)

    def numpy(self):
        assert self.bare
        return self.array

    def __array__(self, *args, **kwargs):
        raise RuntimeError("requires grad")


def test_tensors_of_torch_need_no_torch(weights):
    np.testing.assert_array_equal(np.stack(layers(Tensor(weights))), weights.astype(np.float32))
    outputs = tuple(Tensor(layer[None]) for layer in weights)
    np.testing.assert_array_equal(np.stack(layers(outputs)), weights.astype(np.float32))


def test_an_example_of_a_batch_is_chosen(weights):
    batch = np.stack([weights, 1 - weights])  # [B L N T S]
    for x in (batch.swapaxes(0, 1), list(batch.swapaxes(0, 1))):
        np.testing.assert_array_equal(np.stack(layers(x, 1)), (1 - weights).astype(np.float32))
    np.testing.assert_array_equal(layers(batch[:, 0], 1)[0], (1 - weights[0]).astype(np.float32))
    np.testing.assert_array_equal(layers(batch[:, 0, 0], 1)[0][0], (1 - weights[0, 0]).astype(np.float32))


def test_the_steps_of_generate_become_one_map():
    """The prompt's rows, then one row per token, which sees one key more."""
    rng = np.random.default_rng(0)
    steps = [tuple(rng.random((1, N, 4, 4)) for _ in range(L))]
    steps += [tuple(rng.random((1, N, 1, 5 + t)) for _ in range(L)) for t in range(3)]
    found = layers(tuple(steps))
    assert [layer.shape for layer in found] == [(N, 7, 7)] * L
    np.testing.assert_array_equal(found[1][:, :4, :4], steps[0][1][0].astype(np.float32))
    np.testing.assert_array_equal(found[1][:, 5, :6], steps[2][1][0, :, 0].astype(np.float32))
    assert is_masked(found[1][:, 5, 6]).all() and is_masked(found[1][:, :4, 4:]).all()
    assert not is_masked(found[1][:, 6]).any()


def test_cross_attention_of_generate_keeps_its_columns():
    steps = tuple(tuple(np.full((1, N, 1, S), t + layer) for layer in range(L)) for t in range(T))
    found = layers(steps)
    np.testing.assert_array_equal(found[1][0, :, 0], np.arange(1, T + 1))


def test_masked_arrays_stay_masked_and_nan_stays_nan():
    x = np.ma.masked_array([[0.0, np.nan], [0.5, 0.5]], [[False, False], [True, False]])
    [[layer]] = layers(x)
    assert is_masked(layer).tolist() == [[False, False], [True, False]]
    assert np.isnan(layer).tolist() == [[False, True], [True, False]]
    assert np.isnan(MASKED)


def test_layers_may_differ_in_every_size():
    found = layers([np.ones((2, 3, 4)), np.ones((5, 6, 7))])
    assert [layer.shape for layer in found] == [(2, 3, 4), (5, 6, 7)]


def test_later_changes_of_the_array_are_not_seen():
    x = np.eye(3, dtype=np.float32)
    [[layer]] = layers(x)
    x[:] = 7
    np.testing.assert_array_equal(layer, np.eye(3))


def deleted():
    x = jnp.eye(3)
    x.delete()
    return x


WRONG = {
    "0-d": (5.0, ValueError, r"got \[\]"),
    "1-d": (np.ones(3), ValueError, r"got \[3\], must be \[T S\]"),
    "5-d": (np.ones((2, 4, 3, 5, 7)), ValueError, "batch=0"),
    "6-d": (np.ones((1,) * 6), ValueError, r"got \[1 1 1 1 1 1\]"),
    "empty axis": (np.ones((3, 0)), ValueError, "empty axis"),
    "no layers": ([], ValueError, "no layers"),
    "None": ([None, None], TypeError, "eager"),
    "text": ("abc", TypeError, "got str"),
    "complex": (np.ones((2, 2), complex), TypeError, "complex128"),
    "texts": (np.array([["a"]]), TypeError, "real numbers"),
    "objects": (np.array([[object()]]), TypeError, "real numbers"),
    "ragged": ([[1.0, 2.0], [3.0]], ValueError, "differ in length"),
    "heads of several shapes": ([[np.ones((2, 2)), np.ones((2, 3))]], ValueError, "of one shape"),
    "a batch in a list": ([np.ones((16, N, T, S))], ValueError, r"a batch \[B N T S\] of 16.*batch=0"),
    "a deleted array": (deleted(), ValueError, "deleted or donated"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(untyped, name):
    x, error, match = WRONG[name]
    with pytest.raises(error, match=match) as caught:
        attn.view(x)
    assert "\n" not in str(caught.value)


def test_a_tracer_is_named():
    with pytest.raises(TypeError, match=r"outside of jax\.jit"):
        jax.jit(lambda x: attn.view(x))(jnp.eye(3))


@pytest.mark.parametrize("batch", [2, -1, True, 1.0])
def test_a_wrong_batch_is_named(untyped, batch):
    with pytest.raises(ValueError, match=r"batch: got .*must be a whole number in 0\.\.1"):
        attn.view(np.ones((2, N, T, S)), batch=batch)


def test_a_batch_of_layers_without_one_is_named(weights):
    with pytest.raises(ValueError, match=r"layers of a list must then be \[B N T S\]"):
        attn.view(list(weights), batch=0)


# Kinds and names


def test_outputs_of_models_are_read_by_their_fields(weights):
    layers_of = tuple(layer[None] for layer in weights)
    output = types.SimpleNamespace(
        encoder_attentions=layers_of, decoder_attentions=None, cross_attentions=layers_of, logits=None
    )
    assert [kind.name for kind in attn.view(output).kinds] == ["cross", "encoder"]
    assert [kind.name for kind in attn.view({"attentions": layers_of, "logits": None}).kinds] == ["attention"]


def test_names_may_be_anything_that_has_a_text():
    names = [b"\xff", np.str_("a"), 3, None, "\udc80"]
    [kind] = as_kinds(np.ones((T, T)), names, None, None)
    assert kind.rows.names == ("\\xff", "a", "3", "None", "\udc80")
    assert kind.columns.names is None


def test_names_by_kind(weights):
    given = {"cross": weights, "encoder": np.ones((S, S))}
    kinds = as_kinds(given, {"cross": list("abcde")}, {"cross": list("abcdefg")}, None)
    assert kinds[0].rows.names == tuple("abcde") and kinds[1].rows.names is None


@pytest.mark.parametrize(
    "options, match",
    [
        (dict(rows=["a"] * 78), "cross: 5 rows, but 78 names"),
        (dict(columns=["a"] * 8), "cross: 7 columns, but 8 names"),
        (dict(rows={"other": []}), "rows: got names for other, must be for cross"),
    ],
)
def test_wrong_numbers_of_names_are_named(weights, options, match):
    with pytest.raises(ValueError, match=match):
        attn.view({"cross": weights}, **options)


@pytest.mark.parametrize("names", ["abcde", b"abcde", 5])
def test_one_text_is_not_a_list_of_names(untyped, weights, names):
    with pytest.raises(TypeError, match="must be a list with one name per row"):
        attn.view(weights, rows=names)


# Pictures


@pytest.mark.parametrize(
    "shape, columns, grid, first",
    [((12, 12), 16, (4, 4), 0), ((3, 12, 12), 17, (4, 4), 1), ((8, 16, 3), 32, (4, 8), 0), ((1, 6, 4), 25, (6, 4), 1)],
)
def test_the_grid_of_patches_is_found(shape, columns, grid, first):
    [kind] = as_kinds(np.ones((columns, columns)), None, None, None)
    picture = as_picture(np.ones(shape), kind)
    assert (picture.grid, picture.first, picture.rows_too) == (grid, first, True)


@pytest.mark.parametrize("shape, columns", [((12, 12), 18), ((4,), 16), ((2, 3, 4, 5), 16), ((0, 4), 4)])
def test_a_picture_that_does_not_fit_is_named(shape, columns):
    with pytest.raises(ValueError, match="picture: "):
        attn.view(np.ones((columns, columns)), picture=np.ones(shape))
