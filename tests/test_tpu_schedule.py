"""The reading of a TPU compiler's dump, on a small real one: its vector loads, stores and sums are cut out by hand.

A kernel of 6 steps: x [16, 768] @ w [768, 128] in blocks of [16, 128] and [128, 128], bfloat16. A step multiplies if
its number is below the second of three scalars; the last one writes float32 [16, 128].
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parent / "tpu_schedule"
BUNDLES, SLOTS = (FOLDER / "bundles.txt").read_text(), (FOLDER / "utilization.txt").read_text()
STEPS, READ, WRITTEN = 6, 2 * (16 * 768 + 768 * 128), 4 * 16 * 128
SCALARS = 512
"""Bytes of the copy of three scalars, the smallest there is."""
HLO = """\
HloModule jit_f

%body (p: s32[]) -> s32[] {
  %p = s32[] parameter(0)
  ROOT %add.1 = s32[]{:T(128)} add(%p, %p)
}

%five (p.1: s32[]) -> pred[] {
  %constant.5 = s32[]{:T(128)} constant(5)
  ROOT %lt.1 = pred[]{:T(512)} compare(%p.1, %constant.5), direction=LT
}

%unknown (p.2: (s32[], f32[8])) -> pred[] {
  ROOT %lt.2 = pred[]{:T(512)} compare(%p.2, %p.2), direction=LT
}

ENTRY %main (w: bf16[768,128]) -> (f32[16,128], f32[8]) {
  %copy-start = (bf16[768,128]{1,0:T(8,128)S(1)}, bf16[768,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%w)
  %while.1 = s32[] while(%c), condition=%five, body=%body
  %while.2 = (s32[], f32[8]{0:T(128)S(1)}) while(%t), condition=%unknown, body=%body, metadata={op_name="jit(f)/while"}
  ROOT %tiny.1 = (f32[16,128]{1,0:T(8,128)}, /*index=1*/f32[8]) custom-call(%copy-done), custom_call_target="tpu"
}
"""


@pytest.fixture(scope="module")
def schedule() -> ModuleType:
    path = Path(__file__).parent.parent / "bench" / "tpu_schedule.py"
    spec = importlib.util.spec_from_file_location("tpu_schedule", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_regions_of_the_loop_run_as_often_as_the_scalars_say(schedule: ModuleType) -> None:
    for multiplied in (6, 2, 0):
        found = schedule.run(BUNDLES, SLOTS, {0: [0, multiplied, 0]})
        assert found.guesses == 0
        (product,) = (region for region in found.regions if region.rows)
        assert (product.runs, product.bundles, product.depth, product.rows) == (multiplied, 19, 1, 16)
        # Two more turns than steps: copies in run ahead, copies out behind.
        assert [region.runs for region in found.regions] == [1, 8, 6, multiplied, 6, 1, 6, 8, 1]
        assert sum(region.bundles for region in found.regions) == len(SLOTS.partition("ON:\n")[2].splitlines())


def test_slots_are_counted_region_by_region(schedule: ModuleType) -> None:
    found = schedule.run(BUNDLES, SLOTS)
    (product,) = (region for region in found.regions if region.rows)
    assert {slot: uses for slot, uses in product.slots.items() if uses} == {
        "MATMUL": 6, "MATPUSH": 14, "VALU": 2, "VPOP": 2, "VLOAD": 11, "VSTORE": 2
    }  # fmt: skip
    assert (found.capacity["MATMUL"], found.capacity["VALU"], found.capacity["SPILL"]) == (4, 4, 1)


def test_every_block_is_copied_once(schedule: ModuleType) -> None:
    found = schedule.run(BUNDLES, SLOTS, {0: [0, 6, 0]})
    assert (found.read, found.written) == (READ + SCALARS, WRITTEN)


def test_a_scalar_that_nobody_knows_is_a_guess(schedule: ModuleType) -> None:
    found = schedule.run(BUNDLES, SLOTS)
    assert found.guesses == STEPS
    assert max(region.runs for region in found.regions if region.rows) == STEPS


def test_time_is_that_of_the_slower_of_copies_and_regions(schedule: ModuleType) -> None:
    known = {0: [0, 6, 0]}
    bundles = sum(region.runs * region.bundles for region in schedule.run(BUNDLES, SLOTS, known).regions)
    assert schedule.run(BUNDLES, SLOTS, known).cycles == bundles
    rows = schedule.run(BUNDLES, SLOTS, known, schedule.Rates(rows=16 / 1000))
    assert rows.cycles == bundles + STEPS * (1000 - 19)
    slow = schedule.run(BUNDLES, SLOTS, known, schedule.Rates(bytes=1.0)).cycles
    copies = READ + SCALARS + WRITTEN
    assert copies < slow < copies + bundles


def test_scalars_may_come_from_vmem(schedule: ModuleType) -> None:
    found = schedule.run(BUNDLES.replace("hbm_to_smem", "vmem_to_smem"), SLOTS, {0: [0, 4, 0]})
    assert [region.runs for region in found.regions if region.rows] == [4]
    assert found.read == READ


def test_a_chip_of_two_cores_is_followed_on_the_first(schedule: ModuleType) -> None:
    core = "sld [smem:[#allocation0]] /* megacore core id :: core id */"
    found = schedule.run(BUNDLES.replace("sld [smem:[#allocation4 + $0x1]]", core), SLOTS)
    assert [region.runs for region in found.regions if region.rows] == [0]
    assert found.guesses == 0


def test_a_number_is_also_known_where_it_is_passed_by_value(schedule: ModuleType) -> None:
    operand = "inlined_call_operand.<no memory space> [shape: s32[1], index: 4, kind: input, shape index: {}]"
    bundles = BUNDLES.replace("sld [smem:[#allocation4 + $0x1]]", operand)
    assert bundles != BUNDLES
    found = schedule.run(bundles, SLOTS, {4: [3]})
    assert [region.runs for region in found.regions if region.rows] == [3]


@pytest.mark.parametrize(
    ("instruction", "granules"),
    [
        ("sadd.s32 %s2_s2, %s1_s1", 4),
        ("ssub.s32 %s1_s1, %s3_s3", 0xFFFFFFFE),
        ("smul.u32 %s1_s1, %s3_s3", 35),
        ("sshra.s32 %s2_s2, 31", 0xFFFFFFFF),
        ("sshrl.u32 %s2_s2, 28", 15),
        ("smin.u32 %s2_s2, %s1_s1", 5),
        ("smin.s32 %s2_s2, %s1_s1", 0xFFFFFFFF),
        ("scalar_select %p5_p5, 3, 4", 3),
        ("scalar_select %p6_p6, 3, 4", 4),
        ("smov.u32 (%p5_p5, %s1_s1), 9", 9),
        ("smov.u32 (!%p5_p5, %s1_s1), 9", 5),
        ("sld [smem:[%s3_s3 + $0x2]]", 11),
    ],
)
def test_the_scalar_unit_computes_like_one(schedule: ModuleType, instruction: str, granules: int) -> None:
    lines = [
        "%s1_s1 = smov.u32 5 ;; %s2_s2 = smov.u32 4294967295 ;; %s3_s3 = smov.u32 7",
        "%p5_p5 = scmp.lt.s32.totalorder %s2_s2, 0 ;; %p6_p6 = scmp.lt.u32.totalorder %s2_s2, %s1_s1",
        "%10 = sst [smem:[%s3_s3 + $0x2]] 11",
        f"%s4_s4 = {instruction}",
        "%11 = dma.hbm_to_vmem [thread:$0] /*hbm=*/%s1_s1, /*size_in_granules=*/%s4_s4, %s1_s1, [#allocation2]",
    ]
    bundles = "\n".join(f"  {place:#x}   :  {{ {line} }}" for place, line in enumerate(lines)).replace("0x0 ", "0 ")
    slots = SLOTS.partition("ON:\n")[0] + "ON:\n" + "0 0 0 0 0 0 0 0 0 0 1\n" * len(lines)
    found = schedule.run(bundles, slots)
    assert (found.read, found.guesses) == (32 * granules, 0)


def test_spilled_scalars_and_conditions_behind_a_load_are_followed(schedule: ModuleType) -> None:
    spilled = "sld [smem:[#allocation9_spill]] (%p729_p4)"
    bundles = BUNDLES.replace("sld [smem:[#allocation4 + $0x1]]", spilled)
    first = "{ %9999 = sst [smem:[#allocation9_spill]] %s717_s20 ;; "
    bundles = bundles.replace("{ %p402_p8", first + "%p402_p8")
    assert bundles.count("9_spill") == 2
    # Every step reads what the one before it stored, one more than its number: the first finds nothing.
    found = schedule.run(bundles, SLOTS, {0: [0, 6, 0]})
    assert [region.runs for region in found.regions if region.rows] == [STEPS]
    assert found.guesses == 1


def test_two_programs_are_not_mixed_up(schedule: ModuleType) -> None:
    with pytest.raises(ValueError, match="not of one program"):
        schedule.run(BUNDLES, SLOTS.rpartition("\n0")[0])


def test_a_loop_without_end_is_given_up(schedule: ModuleType) -> None:
    schedule.run(BUNDLES, SLOTS, limit=50)
    with pytest.raises(schedule.TooLong):
        schedule.run(BUNDLES, SLOTS, limit=40)


def test_operations_run_as_often_as_their_loops(schedule: ModuleType) -> None:
    found = [(operation.name, operation.code, runs) for operation, runs in schedule.operations(HLO)]
    assert [(name, runs) for name, code, runs in found if code == "add"] == [("add.1", 5), ("add.1", 1)]
    assert ("tiny.1", "custom-call", 1) in found


def test_an_asynchronous_copy_moves_its_source_once(schedule: ModuleType) -> None:
    copy = next(operation for operation, _ in schedule.operations(HLO) if operation.code == "copy-start")
    assert schedule.moved(copy) == 2 * 768 * 128
    both = copy._replace(shape=copy.shape.replace("S(1)", ""))
    assert schedule.moved(both) == 2 * 2 * 768 * 128


def test_operations_that_are_alike_share_a_schedule(schedule: ModuleType, tmp_path: Path) -> None:
    for name in ("1-tiny.1-00-final_hlo-static-per-bundle-utilization.txt", "2-tiny.1-102-final_bundles.txt"):
        (tmp_path / name).touch()
    (tmp_path / "3-tiny.1-98-schedule-analysis_final_bundles.txt").touch()
    text = "key:tiny.1\nordinal:1\nequivalent_hlos[size=2]:\n  tiny.1\n  tiny.2\nkey:gone\nordinal:2\n  gone\n"
    (tmp_path / "4-TLP-00-deduplication-map.txt").write_text(text)
    found = schedule.schedules(tmp_path)
    assert set(found["tiny.1"]) == {"utilization", "bundles"}
    assert found["tiny.2"] == found["tiny.1"]
    assert found["tiny.1"]["bundles"].name.startswith("2-")


def test_every_allocation_in_vmem_is_counted_once(schedule: ModuleType) -> None:
    text = """$region0: #{tiny.1}
  #allocation3 [shape = 'f32[16,128]{1,0:T(8,128)}', space=vmem, size = 0x2000, scoped, tag = 'scratch operand']
  #allocation4 [shape = 'u8[512]{0}', space=smem, size = 0x200, scoped, tag = 'prefetched SMEM operand 0']
  #allocation9_spill [shape = 'u8[4096]{0}', space=vmem, size = 0x1000, scoped, tag = 'register spill']
$region1: #{tiny.1}
  #allocation3 [shape = 'f32[16,128]{1,0:T(8,128)}', space=vmem, size = 0x2000, scoped, tag = 'scratch operand']
"""
    assert schedule.vmem(text) == 0x3000
