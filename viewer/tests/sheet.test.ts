import { describe, expect, it } from "vitest";
import {
  difference,
  hiddenMass,
  largestColumns,
  largestRows,
  MASKED,
  overHeads,
  rolloutStep,
  select,
  survey,
} from "../src/sheet";
import { HIDE, sheetOf } from "./helpers";

const all = (n: number) => Int32Array.from({ length: n }, (_, i) => i);

describe("hidden columns", () => {
  const sheet = sheetOf([
    [0.5, 0.25, 0.125, 0.125],
    [1, 0, 0, 0],
    [NaN, 0.5, HIDE, 0.25],
    [0.25, NaN, 0.25, Infinity],
  ]);
  const columns = Int32Array.of(1, 2, 3);

  it("are taken out, and what is left sums to 1 in each row that has something left", () => {
    const left = select(sheet, all(4), columns, true);
    expect([...left.values.subarray(0, 3)]).toEqual([0.5, 0.25, 0.25]);
    expect([...left.values.subarray(3, 6)]).toEqual([0, 0, 0]);
    expect(left.values[6]).toBeCloseTo(2 / 3, 6);
    expect(left.bits[7]).toBe(MASKED);
    expect(left.values[8]).toBeCloseTo(1 / 3, 6);
    expect([...left.values.subarray(9)]).toEqual([NaN, 1, Infinity]);
  });

  it("are taken out without a change of the rest, unless asked for", () => {
    const left = select(sheet, Int32Array.of(2, 0), columns, false);
    expect([...left.values]).toEqual([0.5, NaN, 0.25, 0.25, 0.125, 0.125]);
    expect(left.bits[1]).toBe(MASKED);
  });

  it("have a mass, in which NaN and infinity do not count", () => {
    expect([...hiddenMass(sheet, all(4), columns)]).toEqual([0.5, 1, 0, 0.25]);
    expect([...hiddenMass(sheet, Int32Array.of(3), Int32Array.of(0))]).toEqual([0.25]);
  });
});

describe("aggregates", () => {
  it("are masked where all heads are, and elsewhere count masked as 0", () => {
    const heads = [sheetOf([[0.5, HIDE, HIDE, NaN]]), sheetOf([[0.25, 0.5, HIDE, 1]])];
    const mean = overHeads(heads, "mean");
    expect([...mean.values.subarray(0, 2)]).toEqual([0.375, 0.25]);
    expect(mean.bits[2]).toBe(MASKED);
    expect(mean.values[3]).toBeNaN();
    expect([...overHeads(heads, "max").values.subarray(0, 2)]).toEqual([0.5, 0.5]);
    expect(overHeads(heads, "max").values[3]).toBeNaN();
  });

  it("roll out as products of the mean and the identity in equal parts", () => {
    const first = rolloutStep(
      null,
      sheetOf([
        [1, HIDE],
        [0.5, 0.5],
      ]),
    );
    expect([...first.values]).toEqual([1, 0, 0.25, 0.75]);
    // [[1, 0], [0.5, 0.5]] times the above, as the second mean is [[1, 0], [1, 0]].
    const second = rolloutStep(
      first,
      sheetOf([
        [1, 0],
        [1, 0],
      ]),
    );
    expect([...second.values]).toEqual([1, 0, 0.625, 0.375]);
  });

  it("differ by second minus first, where masked is 0 or stays masked", () => {
    const [a, b] = [sheetOf([[0.25, HIDE, HIDE, NaN]]), sheetOf([[0.75, 0.5, HIDE, 1]])];
    expect([...difference(a, b, true).values.subarray(0, 2)]).toEqual([0.5, 0.5]);
    expect([...difference(a, b, false).bits.subarray(1, 3)]).toEqual([MASKED, MASKED]);
    expect(difference(a, b, true).values[3]).toBeNaN();
  });
});

describe("a survey", () => {
  it("has the range of the finite and the other cells that occur", () => {
    const found = survey(sheetOf([[-2, 3, HIDE, Infinity]]));
    expect(found).toEqual({ low: -2, high: 3, masked: true, nan: false, positive: true, negative: false });
    expect(survey(sheetOf([[NaN, -Infinity]]))).toMatchObject({
      low: 0,
      high: 0,
      nan: true,
      negative: true,
      masked: false,
    });
  });
});

describe("the largest", () => {
  const sheet = sheetOf([
    [0.1, NaN, 0.4, -0.5, 0.4, HIDE],
    [1, 0, 2, 0, 0, 0],
  ]);
  it("of a row are ordered, the earlier of equals first, without NaN and masked", () => {
    expect(largestColumns(sheet, 0, 3)).toEqual([2, 4, 0]);
    expect(largestColumns(sheet, 0, 9)).toEqual([2, 4, 0, 3]);
    expect(largestColumns(sheet, 0, 2, true)).toEqual([3, 2]);
  });
  it("of a column are rows", () => expect(largestRows(sheet, 2, 5)).toEqual([1, 0]));
});
