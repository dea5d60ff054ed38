"""The estimates of the compilers, added up: loops as often as they turn, the branch that is taken, calls followed."""

import json

import cycles
import devices
import estimates
import jax
import jax.numpy as jnp
import programs
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from attn.studies.walkthrough import parallel

# As a TPU's compiler writes it. The loop `outer` turns 5 - 2 times, `inner` 4 times; a step is taken, so the second
# branch counts.
TPU = """HloModule jit_call, is_scheduled=true

%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0:T(128)} parameter(0)
  ROOT %t = f32[8]{0:T(128)} tanh(%p), backend_config={"window_config":{"estimated_cycles":"7"}}
}

%inner_end (c: (s32[], f32[8])) -> pred[] {
  %c = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}) parameter(0)
  %four = s32[]{:T(128)} constant(4), metadata={op_name="jit(call)/while"}
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %four), direction=LT, backend_config={"flag_configs":[]}
}

%inner_body (c: (s32[], f32[8])) -> (s32[], f32[8]) {
  %c = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}) parameter(0)
  %one = s32[]{:T(128)} constant(1)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  %x = f32[8]{0:T(128)S(1)} get-tuple-element(%c), index=1
  %y = f32[8]{0:T(128)S(1)} fusion(%x), calls=%fused, backend_config={"window_config":{"estimated_cycles":"10"}}
  %next = s32[]{:T(128)} add(%i, %one), backend_config={"flag_configs":[]}
  ROOT %r = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}) tuple(%next, /*index=1*/%y)
}

%outer_end (c: (f32[8], s32[])) -> pred[] {
  %c = (f32[8]{0:T(128)}, s32[]{:T(128)}) parameter(0)
  %five = s32[]{:T(128)} constant(5)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=1
  ROOT %less = pred[]{:T(512)} compare(%i, %five), direction=LT
}

%outer_body (c: (f32[8], s32[])) -> (f32[8], s32[]) {
  %c = (f32[8]{0:T(128)}, s32[]{:T(128)}) parameter(0)
  %x = f32[8]{0:T(128)} get-tuple-element(%c), index=0
  %i = s32[]{:T(128)} get-tuple-element(%c), index=1
  %one = s32[]{:T(128)} constant(1)
  %zero = s32[]{:T(128)} constant(0)
  %start = s32[]{:T(128)} copy(%zero)
  %state = (s32[]{:T(128)}, f32[8]{0:T(128)}) tuple(%start, %x)
  %inner = (s32[]{:T(128)}, f32[8]{0:T(128)}) while(%state), condition=%inner_end, body=%inner_body
  %y = f32[8]{0:T(128)} get-tuple-element(%inner), index=1
  %z = f32[8]{0:T(128)} copy(%y), backend_config={"window_config":{"estimated_cycles":"100"}}
  %next = s32[]{:T(128)} add(%one, %i)
  ROOT %r = (f32[8]{0:T(128)}, s32[]{:T(128)}) tuple(%z, %next)
}

%skipped (p: f32[8]) -> f32[8] {
  %p = f32[8]{0:T(128)} parameter(0)
  ROOT %k = f32[8]{0:T(128)} copy(%p)
}

%taken (p: f32[8]) -> f32[8] {
  %p = f32[8]{0:T(128)} parameter(0)
  %two = s32[]{:T(128)} constant(2)
  %state = (f32[8]{0:T(128)}, s32[]{:T(128)}) tuple(%p, %two)
  %outer = (f32[8]{0:T(128)}, s32[]{:T(128)}) while(%state), condition=%outer_end, body=%outer_body
  ROOT %x = f32[8]{0:T(128)} get-tuple-element(%outer), index=0
}

%called (p: f32[8]) -> f32[8] {
  %p = f32[8]{0:T(128)} parameter(0)
  %buffer = f32[8]{0:T(128)} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %a = f32[8]{0:T(128)} fusion(%p), calls=%fused, backend_config={"window_config":{"estimated_cycles":"1000"}}
}

ENTRY %main (p: f32[8], b: s32[]) -> f32[8] {
  %p = f32[8]{0:T(128)} parameter(0)
  %b = s32[]{:T(128)} parameter(1)
  %started = (f32[8]{0:T(128)S(1)}, f32[8]{0:T(128)}, u32[]{:S(2)}) copy-start(%p)
  %x = f32[8]{0:T(128)} call(%p), to_apply=%called
  ROOT %y = f32[8]{0:T(128)} conditional(%b, %x, %x), branch_computations={%skipped, %taken}, metadata={op_name="cond"}
}
"""


def test_loops_calls_and_branches_of_a_tpu_program_are_added_up():
    found = estimates.estimate(TPU)
    assert found.cycles == 1000 + 3 * (4 * 10 + 100) and found.operations == 1 + 3 * (4 + 1)
    assert found.without == {"add": 3 * 4 + 3, "compare": 3 * 4 + 3, "copy": 3, "copy-start": 1}


def test_cycles_for_starting_are_taken_from_operations_that_have_them():
    assert estimates.estimate(TPU, start=60).inside == 1000 - 60 + 3 * (4 * 10 + 100 - 60)
    assert estimates.estimate(TPU, start=102).inside == 1000 - 102 + 3 * 4 * 10  # 100 is about as much


def test_a_gpu_program_says_how_often_its_loops_turn_and_has_estimates_of_several_models():
    costs = [{"end_to_end_cycles": 2.5, "name": ""}, {"end_to_end_cycles": 9000, "name": "experimental"}]
    kernel = json.dumps({"reification_cost": costs})
    text = f"""HloModule jit_call
%end (c: (s32[])) -> pred[] {{
  %c = (s32[]) parameter(0)
  ROOT %e = pred[] fusion(%c), kind=kLoop, calls=%f, backend_config={kernel}
}}
%body (c: (s32[])) -> (s32[]) {{
  %c = (s32[]) parameter(0)
  ROOT %k = (s32[]) fusion(%c), kind=kCustom, calls=%f, backend_config={kernel}
}}
%no (p: (s32[])) -> (s32[]) {{
  ROOT %p = (s32[]) parameter(0)
}}
%yes (p: (s32[])) -> (s32[]) {{
  %p = (s32[]) parameter(0)
  ROOT %w = (s32[]) while(%p), condition=%end, body=%body, backend_config={{"known_trip_count":{{"n":"65"}}}}
}}
ENTRY %main (p: (s32[]), q: pred[]) -> (s32[]) {{
  %p = (s32[]) parameter(0)
  %q = pred[] parameter(1)
  ROOT %y = (s32[]) conditional(%q, %p, %p), true_computation=%yes, false_computation=%no
}}
"""
    found = estimates.estimate(text)
    assert (found.cycles, found.inside, found.operations) == (65 * 5.0, 65 * 5.0, 130) and not found.without


@pytest.mark.parametrize(
    "old, new",
    [
        ("direction=LT", "direction=NE"),
        ("constant(4)", "parameter(7)"),
        ("constant(2)", "parameter(7)"),
        ("add(%i, %one)", "add(%i, %i)"),
        ("add(%i, %one)", "multiply(%i, %one)"),
        ("%next = s32[]{:T(128)} add(%one, %i)", "%next = s32[]{:T(128)} copy(%i)"),
        ("tuple(%p, %two)", "parameter(7)"),
        ("while(%state), condition=%outer_end", "while(%missing), condition=%outer_end"),
    ],
)
def test_a_loop_with_an_unknown_number_of_turns_is_refused(old, new):
    assert old in TPU
    with pytest.raises(ValueError, match=r"^(outer|inner): a loop whose number of iterations is unknown"):
        estimates.estimate(TPU.replace(old, new))


@pytest.mark.parametrize("call", ['custom-call(%p), custom_call_target="__cublas$gemm"', "dot(%p, %p)"])
def test_a_product_or_call_without_an_estimate_is_refused(call):
    with pytest.raises(ValueError, match=r"^z: the compiler gives no estimate for this (custom-call|dot)"):
        estimates.estimate(TPU.replace('copy(%y), backend_config={"window_config":{"estimated_cycles":"100"}}', call))


def test_what_is_not_understood_is_refused():
    with pytest.raises(ValueError, match="no estimate for any operation"):
        estimates.estimate(TPU.replace("estimated_cycles", "other"))
    with pytest.raises(ValueError, match="has no ENTRY"):
        estimates.estimate("HloModule jit_call\n")
    with pytest.raises(ValueError, match="not an operation: 'something else'"):
        estimates.estimate(TPU.replace("  ROOT %less", "  something else\n  ROOT %less", 1))


@pytest.mark.parametrize("name", parallel.DEVICES)
def test_a_loop_counts_as_often_as_it_turns(mesh_of, name):
    """Three programs that differ in the number of turns alone: the estimate grows by equal amounts."""
    mesh = mesh_of(name)

    def found(turns):
        def looped(a, x):
            return jax.lax.scan(lambda x, _: (jnp.tanh(x @ a), None), x, length=turns)[0]

        a, x = (jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
                for s in ((256, 256), (8, 256)))  # fmt: skip
        return estimates.estimate(cycles.text_of(jax.jit(looped), (a, x), mesh))

    few, more, most = map(found, (100, 200, 1_000))
    per_turn, operations = more.cycles - few.cycles, more.operations - few.operations
    assert operations >= 100 and operations % 100 == 0
    assert most.operations - few.operations == 9 * operations
    assert most.cycles - few.cycles == pytest.approx(9 * per_turn, rel=1e-6)
    assert per_turn >= 0.9 * few.cycles  # the loop is nearly all of the program


def test_a_tpu_adds_cycles_for_starting_an_operation_and_a_gpu_none(mesh_of):
    assert 1_000 < cycles.start_of(mesh_of("v5e-1")) < 4_000
    assert cycles.start_of(mesh_of("h100-1")) == 0


@pytest.mark.parametrize("name", parallel.DEVICES)
def test_the_recorded_counts_are_those_of_the_compilers(mesh_of, name):
    """The LSTM's at the shortest length, which takes seconds."""
    mesh, recorded = mesh_of(name), json.loads(parallel.COUNTS.read_text())
    if recorded["versions"] != programs.versions():
        pytest.skip(f"the counts are of {recorded['versions']}")
    row = parallel.counted({"counts": recorded}, name, "LSTM", 64)
    start = cycles.start_of(mesh)
    found = cycles.count(parallel.models()["LSTM"], 64, row["batch"], mesh, start)
    assert start == recorded["start"][name]
    assert (found.operations, found.without) == (row["operations"], row["without"])
    assert found.cycles == pytest.approx(row["cycles"], abs=1) and found.inside == pytest.approx(row["inside"], abs=1)


def test_results_go_on_where_they_stopped_and_others_are_refused(tmp_path, monkeypatch, capsys):
    """Without the compilers: a device's estimate is made up."""
    path, counted = tmp_path / "counts.json", []
    found = estimates.Estimate(10.4, 9.6, 3, {"copy": 2})
    monkeypatch.setattr(cycles, "count", lambda *arguments: counted.append(arguments) or found)
    monkeypatch.setattr(cycles, "start_of", lambda mesh: 1.0)
    monkeypatch.setattr(devices, "absent", lambda names: [])
    monkeypatch.setattr(devices, "mesh_of", lambda name: name)
    monkeypatch.setattr(devices, "for_no_device", lambda: None)

    def run(*words):
        monkeypatch.setattr("sys.argv", ["cycles.py", "--output", str(path), "--tokens", "2048", *words])
        return cycles.main()

    assert run("--devices", "v5e-1", "--lengths", "64") == 0 and len(counted) == 2
    assert run("--lengths", "64", "1024") == 0 and len(counted) == 2 + 2 + 2 * 3
    values = json.loads(path.read_text())
    assert len(values["rows"]) == 10 and values["start"] == {"v5e-1": 1.0, "h100-1": 1.0}
    assert values["rows"][0] == {
        "device": "v5e-1", "model": "Transformer", "length": 64, "tokens": 2048, "batch": 32,
        "cycles": 10, "inside": 10, "operations": 3, "without": {"copy": 2},
    }  # fmt: skip
    assert [row["length"] for row in values["rows"] if row["model"] == cycles.BLOCKS] == [1024, 1024]
    for damage in (json.dumps(values | {"versions": {"jax": "0.1"}}), json.dumps(values | {"models": {}}), "[]", "{"):
        path.write_text(damage)
        with pytest.raises(SystemExit, match="2"):
            run()
        error = capsys.readouterr().err
        assert str(path) in error and error.count("\n") == 1
