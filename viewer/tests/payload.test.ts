import { describe, expect, it } from "vitest";
import { Data, levelTable, type Payload } from "../src/payload";
import { MASKED } from "../src/sheet";
import { makeKind, makeLayer, makePayload, pack } from "./helpers";

async function load(payload: Payload): Promise<Data> {
  const data = new Data(payload);
  await data.load();
  return data;
}

const at = (kind: number, layer: number, head: number, frame = 0, run = 0) => ({ run, frame, kind, layer, head });

describe("sheets of float32", () => {
  it("are found by run, frame, kind, layer and head", async () => {
    // 2 runs x 3 frames x (2 heads of 1 x 2, 1 head of 2 x 1, then 3 heads of 1 x 1).
    const kinds = [makeKind([makeLayer(2, 1, 2), makeLayer(1, 2, 1)]), makeKind([makeLayer(3, 1, 1)])];
    const numbers = Float32Array.from({ length: 2 * 3 * 9 }, (_, i) => i);
    const ranges = Float32Array.from({ length: 2 * 3 * 6 * 2 }, (_, i) => -i);
    const change = {
      runs: ["a", "b"],
      frames: ["1", "2", "3"],
      values: await pack(numbers.buffer),
      ranges: await pack(ranges.buffer),
    };
    const data = await load(makePayload(kinds, change));
    expect([...data.sheet(at(0, 0, 1)).values]).toEqual([2, 3]);
    expect([...data.sheet(at(0, 1, 0, 1)).values]).toEqual([13, 14]);
    expect([...data.sheet(at(1, 0, 2, 2, 1)).values]).toEqual([53]);
    expect(data.range(at(1, 0, 0, 0, 1))).toEqual([-(18 + 3) * 2, -(18 + 3) * 2 - 1]);
    expect(data.end(at(0, 0, 1))).toBe(16);
  });

  it("tell a masked cell from NaN and keep infinities", async () => {
    const bits = Uint32Array.of(MASKED, 0x7fc00000, 0x7f800000, 0xff800000, 0x3f000000);
    const values = await pack(bits.buffer);
    const data = await load(
      makePayload([makeKind([makeLayer(1, 1, 5)])], { values, ranges: await pack(new ArrayBuffer(8)) }),
    );
    const sheet = data.sheet(at(0, 0, 0));
    expect([...sheet.bits]).toEqual([...bits]);
    expect([...sheet.values]).toEqual([NaN, NaN, Infinity, -Infinity, 0.5]);
  });

  it("may neither be missing nor too many", async () => {
    for (const length of [8, 16]) {
      const change = { values: await pack(new ArrayBuffer(length)), ranges: await pack(new ArrayBuffer(8)) };
      await expect(load(makePayload([makeKind([makeLayer(1, 1, 3)])], change))).rejects.toThrow("its layers need 12");
    }
  });
});

describe("sheets of levels", () => {
  it("are squares of the level if nothing is below zero", () => {
    const table = levelTable(0, 0.5);
    expect(table[0]).toBe(0);
    expect(table[63]).toBeCloseTo(0.125, 6);
    expect(table[126]).toBe(0.5);
  });

  it("are signed squares if something is below zero", () => {
    const table = levelTable(-4, 2);
    expect(table[0]).toBe(-4);
    expect(table[63]).toBe(0);
    expect(table[84]).toBeCloseTo(4 / 9, 6);
    expect(table[126]).toBe(4);
  });

  it("are decoded with the range of their head, specials too", async () => {
    const levels = Uint8Array.of(0, 63, 126, 254, 255, 253, 252, 126);
    const ranges = Float32Array.of(0, 1, 0, 0.25);
    const kinds = [makeKind([makeLayer(2, 2, 2)])];
    const change = { encoding: "levels" as const, values: await pack(levels), ranges: await pack(ranges.buffer) };
    const data = await load(makePayload(kinds, change));
    const [first, second] = [data.sheet(at(0, 0, 0)), data.sheet(at(0, 0, 1))];
    expect([...first.values.subarray(0, 3)]).toEqual([0, 0.25, 1]);
    expect(first.bits[3]).toBe(MASKED);
    expect([...second.values]).toEqual([NaN, Infinity, -Infinity, 0.25]);
    expect(second.bits[0]).not.toBe(MASKED);
  });
});

describe("the largest of true rows", () => {
  it("are of the rows asked for, largest first, without empty places", async () => {
    // 2 heads of 3 true rows, pooled in pairs; the largest 2 of each row.
    const index = Uint32Array.of(0, 0, 0, 0, 0, 0, 5, 1, 4, 0xffffffff, 2, 3);
    const value = Float32Array.of(0, 0, 0, 0, 0, 0, 0.5, 0.25, 0.75, 0, 0.125, 0.0625);
    const change = {
      values: await pack(new ArrayBuffer(2 * 2 * 3 * 4)),
      ranges: await pack(new ArrayBuffer(16)),
      top: { k: 2, index: await pack(index.buffer), value: await pack(value.buffer) },
    };
    const data = await load(makePayload([makeKind([makeLayer(2, 3, 6, [2, 2])])], change));
    expect(data.largest(at(0, 0, 1), 0, 2)).toEqual([
      { row: 1, column: 4, value: 0.75 },
      { row: 0, column: 5, value: 0.5 },
      { row: 0, column: 1, value: 0.25 },
    ]);
    expect(data.largest(at(0, 0, 1), 2, 4).map(({ row }) => row)).toEqual([2, 2]);
  });
});
